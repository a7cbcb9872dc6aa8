"""Time a decode step of one attention layer: FA3 and FlashInfer dense, FlashInfer over sparse tables, SPLA, the floor.

    python benchmarks/decode.py --out benchmarks/results/decode_h200.json

Every implementation reads the same paged cache in the same process. A measurement is a CUDA graph of several decode
steps in a row, as a model's layers are, each on rows of its own, so that the data of the steps together exceeds twice
the L2 cache; it is replayed, and the median of a step and the spread (10th to 90th percentile) are reported. Data are
random, outputs are checked against a float64 softmax (dense) before they are timed, and a short table comes last.

The floor is the bytes that a step has to move (statistics of all complete pages, selected pages, float32 state) over
the bandwidth of a large device-to-device copy measured in the same run.
"""

import argparse
import contextlib
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.kernels import triton_decode
from spla_backend.kernels.triton_decode import TritonPagedSpla, Tuning

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
DTYPE = torch.bfloat16
SCALE = HEAD_SIZE**-0.5
L2_BYTES = 60e6
MAX_STEPS = 16  # steps a graph


@dataclass
class Rows:
    """One step's rows."""

    query: torch.Tensor  # [batch, H, d]
    block_table: torch.Tensor  # [batch, pages] int32
    state_table: torch.Tensor  # [batch, K] int32
    output: torch.Tensor  # [batch, H, d]


class Pool:
    """A cache with rows of one length, statistics and stamps in place, in random page order."""

    def __init__(self, op: TritonPagedSpla, context: int, num_rows: int) -> None:
        layout, device = op.page_layout, "cuda"
        page, per_row = layout.page_size, -(-context // layout.page_size)
        blocks = op.state_layout.num_blocks
        total = num_rows * (per_row + blocks)
        self.context, self.op = context, op
        self.kv_cache = torch.empty(total, KV_HEADS, layout.rows, 2 * HEAD_SIZE, dtype=DTYPE, device=device)
        words = self.kv_cache.view(torch.int32).flatten(2)  # [total, G, words]
        for start in range(0, total, 4096):
            part = self.kv_cache[start : start + 4096]
            part.normal_()
            variance, mean = torch.var_mean(part[:, :, :page, :HEAD_SIZE].float(), dim=2, correction=0)
            moments = torch.cat([mean, variance], -1)[..., : layout.statistics_width]
            part[:, :, page:].flatten(2)[..., : layout.statistics_elements] = moments.to(DTYPE)
            ids = torch.arange(start, start + len(part), dtype=torch.int32, device=device)
            words[start : start + 4096, :, -4:] = ids[:, None, None]
        order = torch.randperm(total, device=device).to(torch.int32)
        self.block_table = order[: num_rows * per_row].view(num_rows, per_row)
        self.state_table = order[num_rows * per_row :].view(num_rows, blocks)
        self.num_rows = num_rows

    def steps(self, batch: int) -> list[Rows]:
        out = []
        for start in range(0, self.num_rows - batch + 1, batch):
            query = torch.randn(batch, HEADS, HEAD_SIZE, device="cuda").to(DTYPE)
            rows = slice(start, start + batch)
            tables = self.block_table[rows].contiguous(), self.state_table[rows].contiguous()
            out.append(Rows(query, *tables, torch.full_like(query, float("nan"))))
        return out


def time_steps(run: Callable[[Rows], None], steps: list[Rows], replays: int = 25) -> tuple[float, float]:
    """Median and spread in microseconds of one step."""
    repeat = max(1, 8 // len(steps))
    for rows in steps:
        run(rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for rows in steps:
                run(rows)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (repeat * len(steps)))
    times.sort()
    return statistics.median(times), times[int(0.9 * len(times))] - times[int(0.1 * len(times))]


def make_op(
    budget: int, page: int, max_rows: int, context: int, tuning: Tuning | None = None, **more
) -> TritonPagedSpla:
    return TritonPagedSpla(
        SplaParameters(page, page, budget // page, **more),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_SIZE,
        cache_dtype=DTYPE,
        scale=SCALE,
        max_num_rows=max_rows,
        max_model_len=max(context, 131072),  # an engine's limit does not follow the length of its rows
        device="cuda",
        tuning=tuning,
    )


def spla_runner(op: TritonPagedSpla, pool: Pool, batch: int) -> Callable[[Rows], None]:
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    lengths = torch.full((batch,), pool.context, dtype=torch.int32, device="cuda")

    def run(rows: Rows) -> None:
        op.decode(
            rows.query, pool.kv_cache, pool.kv_cache, starts, lengths, rows.block_table, rows.state_table,
            rows.output, 1,
        )  # fmt: skip

    return run


def fa3_runner(pool: Pool, batch: int) -> Callable[[Rows], None]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    page = pool.op.params.page_size
    keys, values = (x.transpose(1, 2) for x in pool.kv_cache[:, :, :page].split(HEAD_SIZE, -1))  # [pages, B, G, d]
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    lengths = torch.full((batch,), pool.context, dtype=torch.int32, device="cuda")
    metadata = get_scheduler_metadata(
        batch_size=batch, max_seqlen_q=1, max_seqlen_k=pool.context, num_heads_q=HEADS, num_heads_kv=KV_HEADS,
        headdim=HEAD_SIZE, cache_seqlens=lengths, qkv_dtype=DTYPE, cu_seqlens_q=starts, page_size=page, causal=True,
    )  # fmt: skip

    def run(rows: Rows) -> None:
        flash_attn_varlen_func(
            q=rows.query, k=keys, v=values, out=rows.output, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lengths,
            max_seqlen_k=pool.context, softmax_scale=SCALE, causal=True, block_table=rows.block_table, fa_version=3,
            scheduler_metadata=metadata,
        )  # fmt: skip

    return run


def flashinfer_runner(pool: Pool, batch: int, indptr: torch.Tensor, indices: list[torch.Tensor], sparse: bool):
    """Dense: a request a row. Sparse: a request a (row, kv head), over SPLA's page tables. `indices`: one a step."""
    import flashinfer

    layout = pool.op.page_layout
    page = layout.page_size
    cache = pool.kv_cache
    if sparse:
        cache = cache.view(-1, 1, *cache.shape[2:])  # [pages * G, 1, B + r, 2 d]
    keys, values = cache[:, :, :page].split(HEAD_SIZE, -1)  # HND
    requests = len(indptr) - 1
    heads, kv_heads = (HEADS // KV_HEADS, 1) if sparse else (HEADS, KV_HEADS)
    last = torch.full((requests,), (pool.context - 1) % page + 1, dtype=torch.int32, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(512 << 20, dtype=torch.uint8, device="cuda"),
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=torch.empty_like(indptr),
        paged_kv_indices_buffer=torch.empty_like(indices[0]),
        paged_kv_last_page_len_buffer=torch.empty_like(last),
    )
    wrapper.plan(
        indptr, indices[0], last, heads, kv_heads, HEAD_SIZE, page, q_data_type=DTYPE, kv_data_type=DTYPE,
        sm_scale=SCALE,
    )  # fmt: skip
    step_of: dict[int, torch.Tensor] = {}

    def run(rows: Rows) -> None:
        # The wrapper reads its own index buffer; the copy of the step's indices stands for a selection writing there.
        wrapper._paged_kv_indices_buf[: indices[0].numel()].copy_(step_of[id(rows)])
        query = rows.query.view(requests, heads, HEAD_SIZE)
        wrapper.run(query, (keys, values), out=rows.output.view(requests, heads, HEAD_SIZE))

    run.step_of = step_of  # type: ignore[attr-defined]
    return run


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and written bytes counted."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * source.numel() / (statistics.median(times) * 1e-3)


def floor_bytes(op: TritonPagedSpla, context: int, batch: int) -> int:
    """Bytes that a steady step must move."""
    layout, state = op.page_layout, op.state_layout
    pages = (context - 1) // layout.page_size
    if pages + 1 <= op.params.budget_blocks:
        return batch * KV_HEADS * context * 2 * HEAD_SIZE * layout.itemsize
    statistics_bytes = pages * layout.statistics_elements * layout.itemsize
    selected = op.params.budget_blocks * layout.page_size * 2 * HEAD_SIZE * layout.itemsize
    return batch * KV_HEADS * (statistics_bytes + selected + state.body_rows * HEAD_SIZE * 4)


def check_dense(pool: Pool, rows: Rows, what: str) -> None:
    """Compare a dense output's first row with a float64 softmax."""
    page = pool.op.params.page_size
    kv = pool.kv_cache[rows.block_table[0].long(), :, :page].transpose(0, 1).flatten(1, 2)  # [G, L, 2 d]
    worst = 0.0
    for head in range(0, HEADS, HEADS // KV_HEADS):
        keys, values = kv[head // (HEADS // KV_HEADS), : pool.context].double().split(HEAD_SIZE, -1)
        weights = torch.softmax(keys @ rows.query[0, head].double() * SCALE, 0)
        want, got = weights @ values, rows.output[0, head].double()
        worst = max(worst, float((got - want).norm() / want.norm()))
    if not worst < 1e-2:
        raise RuntimeError(f"{what}: relative error {worst}")


def check_spla(op: TritonPagedSpla, pool: Pool, rows: Rows) -> None:
    """Compare one kv head of the first row with the float64 reference."""
    from spla_backend.algorithm.reference import spla_token

    spla_runner(op, pool, len(rows.query))(rows)
    layout, group = op.page_layout, HEADS // KV_HEADS
    pages = rows.block_table[0].long()
    kv = pool.kv_cache[pages, :1]  # [pages, 1, B + r, 2 d]
    keys, values = (
        kv[:, :, : layout.page_size].transpose(1, 2).flatten(0, 1)[: pool.context].cpu().double().split(HEAD_SIZE, -1)
    )  # [L, 1, d]
    complete = (pool.context - 1) // layout.page_size
    statistic = kv[:complete, :, layout.page_size :].flatten(2)[..., : layout.statistics_elements].cpu().double()
    query = rows.query[0, :group].cpu().double() * SCALE
    want = spla_token(query, keys, values, op.params, statistics=statistic).output
    got = rows.output[0, :group].cpu().double()
    error = float((got - want).norm() / want.norm())
    if not error < 1e-2:
        raise RuntimeError(f"spla at {pool.context}: relative error {error}")


@contextlib.contextmanager
def without(*kernels: str) -> Iterator[None]:
    """Leave launches of `triton_decode` out."""

    class Nothing:
        def __getitem__(self, grid: object) -> Callable:
            return lambda *args, **kwargs: None

    kept = {name: getattr(triton_decode, name) for name in kernels}
    for name in kernels:
        setattr(triton_decode, name, Nothing())
    try:
        yield
    finally:
        for name, kernel in kept.items():
            setattr(triton_decode, name, kernel)


def free_memory() -> None:
    triton_decode._Scratch._instances.clear()
    torch.cuda.empty_cache()


def num_rows_for(batch: int, context: int, token_bytes: int) -> int:
    """Rows so that what the steps of a graph read exceeds twice the L2, as far as memory allows."""
    row_bytes = context * KV_HEADS * token_bytes
    read = context // 64 * KV_HEADS * 512 + 2048 * KV_HEADS * 512  # by SPLA, which reads least
    wanted = max(2, -(-int(2 * L2_BYTES) // (batch * read))) * batch
    while wanted > batch and wanted * row_bytes > 90e9:
        wanted -= batch
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="4096,8192,16384,32768,65536,131072,524288")
    parser.add_argument("--batches", default="1,4,8,32")
    parser.add_argument("--budgets", default="2048")
    parser.add_argument("--pages", default="64")
    parser.add_argument("--impls", default="fa3,flashinfer_dense,flashinfer_sparse,spla")
    parser.add_argument("--breakdown", action="store_true", help="time the launches of SPLA apart")
    parser.add_argument("--check", action="store_true", help="compare SPLA with the float64 reference first")
    parser.add_argument("--append", action="store_true", help="add to the rows that the file has already")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="only draw the rows of this file, as PNG files beside it")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot)
        return

    def numbers(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    import triton

    impls = args.impls.split(",")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    for name in ("vllm", "flashinfer"):
        with contextlib.suppress(Exception):
            versions[name] = __import__(name).__version__
    properties = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    hardware = {
        "gpu": properties.name,
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "copy_bytes_per_s": round(bandwidth),
    }
    rows: list[dict] = []
    command = " ".join(["python", *sys.argv])
    if args.append and args.out and args.out.exists():
        rows = json.loads(args.out.read_text())["rows"]

    def record(impl: str, us: float, spread: float, **where: int) -> None:
        row = {"impl": impl, **where, "us": round(us, 2), "spread_us": round(spread, 2)}
        rows.append(row)
        print(row, flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            result = {"command": command, "versions": versions, "hardware": hardware, "rows": rows}
            args.out.write_text(json.dumps(result, indent=1) + "\n")

    for page in numbers(args.pages):
        for context in numbers(args.contexts):
            for batch in numbers(args.batches):
                for index, budget in enumerate(numbers(args.budgets)):
                    where = {"batch": batch, "context": context, "budget": budget, "page": page}
                    op = make_op(budget, page, batch, context)
                    layout = op.page_layout
                    per_token = layout.rows * 2 * HEAD_SIZE * layout.itemsize // page
                    if batch * context * KV_HEADS * per_token > 100e9:
                        print("skipped, too large:", where, flush=True)
                        continue
                    if index == 0:  # the budgets of a shape share its cache
                        pool = None
                        free_memory()
                        op = make_op(budget, page, batch, context)
                        pool = Pool(op, context, num_rows_for(batch, context, per_token))
                        steps = pool.steps(batch)[:MAX_STEPS]
                    assert pool is not None
                    record("floor", floor_bytes(op, context, batch) / bandwidth * 1e6, 0.0, **where)
                    if "fa3" in impls and index == 0:
                        run = fa3_runner(pool, batch)
                        run(steps[0])
                        check_dense(pool, steps[0], "fa3")
                        us, spread = time_steps(run, steps)
                        for other in numbers(args.budgets):
                            record("fa3", us, spread, **(where | {"budget": other}))
                    if "flashinfer_dense" in impls and index == 0:
                        per_row = pool.block_table.shape[1]
                        indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * per_row
                        indices = [s.block_table.flatten() for s in steps]
                        run = flashinfer_runner(pool, batch, indptr, indices, sparse=False)
                        run.step_of.update({id(s): i for s, i in zip(steps, indices, strict=True)})
                        run(steps[0])
                        check_dense(pool, steps[0], "flashinfer")
                        us, spread = time_steps(run, steps)
                        for other in numbers(args.budgets):
                            record("flashinfer_dense", us, spread, **(where | {"budget": other}))
                    run = spla_runner(op, pool, batch)
                    if args.check:
                        check_spla(op, pool, steps[0])
                    tables = []
                    for step in steps:
                        run(step)
                        tables.append(op.page_table[:batch].flatten().clone())
                        if bool(step.output.isnan().any()):
                            raise RuntimeError("spla wrote NaN")
                    if "spla" in impls:
                        record("spla", *time_steps(run, steps), **where)
                    if args.breakdown:
                        with without("attend_kernel"):
                            record("spla_prepare_only", *time_steps(run, steps), **where)
                    if "flashinfer_sparse" in impls and context > budget:
                        count = budget // page
                        indptr = torch.arange(batch * KV_HEADS + 1, dtype=torch.int32, device="cuda") * count
                        run = flashinfer_runner(pool, batch, indptr, tables, sparse=True)
                        run.step_of.update({id(s): i for s, i in zip(steps, tables, strict=True)})
                        record("flashinfer_sparse", *time_steps(run, steps), **where)
    print_table(rows)


def plot(path: Path) -> None:
    """Time over context for each batch, at the budget and page that most rows have."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = json.loads(path.read_text())
    rows = [r for r in result["rows"] if r["budget"] == 2048 and r["page"] == 64]
    names = {
        "fa3": "FA3, dense",
        "flashinfer_dense": "FlashInfer, dense",
        "flashinfer_sparse": "FlashInfer, selected pages only, no selection",
        "spla": "SPLA",
        "floor": "SPLA, byte floor",
    }
    batches = sorted({r["batch"] for r in rows})
    figure, axes = pyplot.subplots(1, len(batches), figsize=(4 * len(batches), 4), sharey=True)
    for axis, batch in zip(axes, batches, strict=True):
        for color, (impl, label) in enumerate(names.items()):
            points = sorted({(r["context"], r["us"]) for r in rows if r["impl"] == impl and r["batch"] == batch})
            if points:
                axis.loglog(*zip(*points, strict=True), marker="o", label=label, color=f"C{color}", base=2)
        axis.set(title=f"batch {batch}", xlabel="context, tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("one layer, microseconds")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"Decode attention, H=32 G=8 d=128 bf16, budget 2048 tokens, page 64, {result['hardware']['gpu']}")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)

    figure, axis = pyplot.subplots(figsize=(5, 4))
    for batch in batches:
        us = {(r["impl"], r["context"]): r["us"] for r in rows if r["batch"] == batch and r.get("run", 0) == 0}
        contexts = sorted(c for impl, c in us if impl == "spla" and ("fa3", c) in us)
        ratios = [us["fa3", c] / us["spla", c] for c in contexts]
        axis.loglog(contexts, ratios, marker="o", label=f"batch {batch}", base=2)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xlabel="context, tokens", ylabel="FA3 time / SPLA time", title=result["hardware"]["gpu"])
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path.with_name(path.stem + "_ratio.png"), dpi=130)


def print_table(rows: list[dict]) -> None:
    """One line a shape, ratios to FA3."""
    names = ["fa3", "flashinfer_dense", "flashinfer_sparse", "spla", "floor"]
    heading = " ".join(f"{n:>17}" for n in names)
    print(f"{'context':>8} {'batch':>5} {'budget':>6} {'page':>4} {heading}  fa3/spla")
    shapes = dict.fromkeys((r["context"], r["batch"], r["budget"], r["page"]) for r in rows)
    for context, batch, budget, page in shapes:
        us = {
            r["impl"]: r["us"]
            for r in rows
            if (r["context"], r["batch"], r["budget"], r["page"]) == (context, batch, budget, page)
        }
        cells = " ".join(f"{us.get(n, math.nan):17.1f}" for n in names)
        ratio = us.get("fa3", math.nan) / us.get("spla", math.nan)
        print(f"{context:8d} {batch:5d} {budget:6d} {page:4d} {cells}  {ratio:7.2f}")


if __name__ == "__main__":
    main()
