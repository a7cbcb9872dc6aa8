"""Time the prefill of one attention layer: FA3 dense, SPLA, SPLA's floor.

    python benchmarks/prefill.py --out benchmarks/results/prefill_h200.json

One row of `context` tokens, nothing cached before, over one paged cache in one process. A measurement is the median of
several calls between CUDA events, and the spread (10th to 90th percentile); what an engine plans once a step for all
layers, for SPLA and FA3 alike, is planned before. Tokens below `--dense-below` attend densely, through FA3, as in the
backend. `uniform` inputs are independent random
vectors, so that neighbouring tiles choose unrelated blocks: the hardest case. In `drifting` inputs the queries of
neighbouring tokens are alike, as a model's are; `captured` ones select much as SmolLM2's tokens did on a short text
(`captured`). SPLA outputs of sampled tokens are checked against the float64
reference before they are timed, near-ties of the selection as such. A short table comes last.

The floor is the larger of two: the products (`prompt_costs.py` counts the same ones) at the rate of a large bf16 matrix
product measured in the same run, and the bytes of keys, values, queries and outputs at the bandwidth of a large copy.
"""

import argparse
import contextlib
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from decode import DTYPE, HEAD_SIZE, HEADS, KV_HEADS, LAYER, SCALE, Pool, copy_bandwidth

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.reference import TokenResult, candidate_voters_of, select_blocks, spla_token, voters_of
from spla_backend.algorithm.two_level import coarse_parameters
from spla_backend.kernels.gpu.layer import GpuLayer
from spla_backend.kernels.gpu.prefill.passes import SCRATCH_BYTES, PrefillPasses
from spla_backend.kernels.gpu.prefill.sizes import PrefillTuning
from spla_backend.kernels.gpu.store import Store
from spla_backend.kernels.interface import Limits

TOLERANCE = 2e-2
"""Relative error of a token in bf16; an exchanged page makes more."""

NEAR_TIE = 2e-4
"""How far apart, in the log of the shared score, blocks may be that the rounding of `q^2` exchanges: on inputs like
these it is wrong by 9e-5 at most (`NOTES.md`), for either block."""


DEFAULTS = {"fine_block": 16, "fine_source": "int4", "least_candidates": 8192 // 64, "statistics_dtype": "fp8"}
"""Of options, for pages of 64 tokens; `--options` goes before them."""
LAYERS = 8
"""Of a chunk; their pages together are larger than the second-level cache."""


def matmul_rate() -> float:
    """FLOP a second of an 8192-cubed bf16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    return 2 * 8192**3 / (time_calls(lambda: a @ b)[0] * 1e-3)


def time_calls(run: Callable[[], object], calls: int = 7) -> tuple[float, float]:
    """Median and spread in milliseconds; of three calls where one takes long."""
    times: list[float] = []
    run()
    while len(times) < (3 if times and times[0] > 500 else calls):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    times.sort()
    return statistics.median(times), times[-1 - calls // 10] - times[calls // 10]


def queries(context: int, kind: str) -> torch.Tensor:
    """`[context, H, d]`."""
    fresh = torch.randn(context, HEADS, HEAD_SIZE, device="cuda")
    if kind == "uniform":
        return fresh.to(DTYPE)
    slow = torch.randn(-(-context // 64) + 1, HEADS, HEAD_SIZE, device="cuda")
    part = torch.arange(context, device="cuda") % 64 / 64
    index = torch.arange(context, device="cuda") // 64
    mixed = slow[index] * (1 - part)[:, None, None] + slow[index + 1] * part[:, None, None]
    return (0.9 * mixed / (part**2 + (1 - part) ** 2).sqrt()[:, None, None] + 0.44 * fresh).to(DTYPE)


def captured(pool: Pool, context: int) -> torch.Tensor:
    """Queries `[context, H, d]` that select much as SmolLM2's tokens did (`captured_pages.npz`); they change keys.

    The record is of 1024 tokens, repeated: each time its pages stand for other ones, drawn at random from those before.
    Every page gets a direction of its own, which its keys have a part of, and a query is the sum of the directions of
    the pages that it shall select, a quarter of them a head of the group. In 128 dimensions so many directions are not
    independent, so that not all of them come out.
    """
    record = numpy.load(Path(__file__).parent / "captured_pages.npz")
    bits = numpy.bitwise_xor.accumulate(record["change"], axis=1)
    chosen = torch.from_numpy(numpy.unpackbits(bits, axis=-1)[..., : int(record["pages"])]).cuda()  # [G, 1024, n]
    heads, length, number = chosen.shape
    page, pages, group = pool.layer.params.page_size, pool.block_table.shape[1], HEADS // KV_HEADS
    directions = torch.nn.functional.normalize(torch.randn(heads, pages, HEAD_SIZE, device="cuda"), dim=-1)
    cache, table = pool.kv_cache, pool.block_table[0].long()
    store = Store(pool.layer)
    for place in range(0, pages, 64):
        ids = table[place : place + 64]
        keys, values = cache[ids, :, :page].transpose(1, 2).flatten(0, 1).split(HEAD_SIZE, -1)  # [tokens, G, d]
        shift = 4 * directions[:, place : place + 64].transpose(0, 1).repeat_interleave(page, 0)
        slots = (ids[:, None] * page + torch.arange(page, device="cuda")).flatten()
        store.update_cache((keys.float() + shift).to(DTYPE), values.contiguous(), cache, slots)
    query = torch.empty(context, HEADS, HEAD_SIZE, device="cuda", dtype=DTYPE)
    for start in range(0, context, length):
        before = max(1, start // page - 2)  # pages that all of these tokens may select freely
        order = torch.randperm(before, device="cuda").repeat(-(-number // before))[:number]
        stands = torch.minimum(1 + order, torch.tensor(pages - 1, device="cuda"))
        for head in range(HEADS):
            mine = chosen[head // group].float() * (torch.arange(number, device="cuda") % group == head % group)
            summed = mine[: context - start] @ directions[head // group, stands]  # [1024, d]
            query[start : start + length, head] = (8 * summed).to(DTYPE)
    return query


def inputs(pool: Pool, context: int, kind: str) -> torch.Tensor:
    """Queries `[context, H, d]` of a kind; `captured` ones change the pool's keys."""
    return captured(pool, context) if kind == "captured" else queries(context, kind)


def fa3(pool: Pool, query: torch.Tensor, output: torch.Tensor, start: int = 0, row: int = 0) -> Callable[[], object]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    page = pool.layer.params.page_size
    keys, values = (x.transpose(1, 2) for x in pool.kv_cache[:, :, :page].split(HEAD_SIZE, -1))  # [pages, B, G, d]
    starts = torch.tensor([0, len(query)], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([start + len(query)], dtype=torch.int32, device="cuda")
    return lambda: flash_attn_varlen_func(
        q=query, k=keys, v=values, out=output, cu_seqlens_q=starts, max_seqlen_q=len(query), seqused_k=lengths,
        max_seqlen_k=start + len(query), softmax_scale=SCALE, causal=True, block_table=pool.block_table[row : row + 1],
        fa_version=3,
    )  # fmt: skip


def spla(
    op: PrefillPasses, pool: Pool, query: torch.Tensor, output: torch.Tensor, start: int = 0
) -> Callable[[], None]:
    """One layer of a step, which is planned once for all layers; the dense beginning through FA3."""
    plan = op.planner.plan(0, [0, len(query)], [start + len(query)])
    dense = [fa3(pool, query[: rows.num_tokens], output[: rows.num_tokens], start) for rows in plan.dense]

    def run() -> None:
        for attend in dense:
            attend()
        for step in plan.passes:
            op.run(step, query, pool.kv_cache, pool.kv_cache, pool.block_table, pool.state_table, output)

    return run


def gap(scores: torch.Tensor, selected: list[int]) -> float:
    """How far the best score left out is from the worst that is selected."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[[block for block in selected if block < len(scores)]] = True
    return math.inf if bool(chosen.all()) else float((scores[chosen] - scores[~chosen].max()).abs().min())


def near_tie(want: TokenResult, position: int, params: SplaParameters) -> float:
    """The smaller gap of the two levels."""
    fine, scores = want.fine_scores[0], want.group_scores[0]
    if not fine:
        return gap(scores, want.selected[0])
    order = {block: i for i, block in enumerate(fine)}
    of_fine = gap(torch.stack(list(fine.values())), [order[block] for block in want.selected[0] if block in order])
    return min(of_fine, gap(scores, select_blocks(scores, position, coarse_parameters(params))))


def stored(pool: Pool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reference reads of kv head 1 of row 0, float64: keys and values `[tokens, 1, 2 d]`, statistics."""
    layout = pool.layer.page_layout
    kv = pool.kv_cache[pool.block_table[0].long(), 1:2].cpu()  # [pages, 1, B + r, 2 d]
    tokens = kv[:, :, : layout.page_size].transpose(1, 2).flatten(0, 1).double()
    return tokens, layout.statistics(kv).transpose(1, 2).flatten(0, 1).double()  # [blocks, 1, width]


def check(
    op: PrefillPasses,
    known: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    output: torch.Tensor,
    start: int = 0,
    *,
    many: bool = True,
) -> tuple[float, int]:
    """Worst relative error of sampled tokens, one kv head, and how many of them are near-ties; `known` is `stored`."""
    (tokens, statistic), params, group = known, op.params, HEADS // KV_HEADS
    worst, ties = 0.0, 0
    first = max(op.dense_below, start)
    end = start + len(query)
    picks = sorted({first, end - 1} | ({min(first + 77, end - 1), (first + end) // 2, end - 2} if many else set()))
    heads = slice(group, 2 * group)

    def at(positions: list[int]) -> torch.Tensor:
        return query[[p - start for p in positions], heads].cpu().double() * SCALE

    for position in picks:
        keys, values = tokens[: position + 1].split(HEAD_SIZE, -1)
        want = spla_token(
            at([position])[0], keys, values, params, tile_queries=at(voters_of(position, range(first, end), params)),
            candidate_queries=at(candidate_voters_of(position, range(first, end), params)),
            statistics=statistic[: position // params.page_size * params.blocks_per_page],
        )  # fmt: skip
        got = output[position - start, heads].cpu().double()
        error = float((got - want.output).norm() / want.output.norm())
        if not error < TOLERANCE and (apart := near_tie(want, position, params)) < NEAR_TIE:
            print(f"    error {error:.1e} where two blocks are {apart:.1e} apart", flush=True)
            ties += 1
        else:
            worst = max(worst, error)
    return worst, ties


class Layers:
    """Chunks of `LAYERS` layers, each with pages and a recurrent state of its own, as an engine runs them one after the
    other: a chunk finds the state that the chunk before left, and no layer finds another's pages in the cache.

    Args:
        op: Sparse prefill.
        context: The most tokens of a row.
    """

    def __init__(self, op: PrefillPasses, context: int) -> None:
        self.op, self.context, self.pool = op, context, Pool(op.layer, context, LAYERS)
        self.blocks = self.pool.state_table.flatten().long()
        self.stored = stored(self.pool)

    def states(self, start: int) -> torch.Tensor:
        """State blocks of all layers as a chunk at `start` finds them."""
        # Rows that attend densely leave such states.
        dense = PrefillPasses(self.op.layer, limits(self.context, max_num_tokens=1, dense_below=1 << 30))
        step = dense.planner.plan(0, [0, 1], [start]).folds
        cache = self.pool.kv_cache
        if step is not None:
            for row in range(LAYERS):
                dense.fold(
                    step, cache, cache, *(x[row : row + 1] for x in (self.pool.block_table, self.pool.state_table))
                )
        return cache[self.blocks]

    def sparse(self, query: torch.Tensor, output: torch.Tensor, start: int, layers: int = LAYERS) -> Callable[[], None]:
        """The first layers of a chunk at `start`, planned."""
        passes = self.op.planner.plan(0, [0, len(query)], [start + len(query)]).passes
        cache = self.pool.kv_cache
        tables = [[x[row : row + 1] for x in (self.pool.block_table, self.pool.state_table)] for row in range(layers)]

        def run() -> None:
            for block_table, state_table in tables:
                for step in passes:
                    self.op.run(step, query, cache, cache, block_table, state_table, output)

        return run

    def dense(self, query: torch.Tensor, output: torch.Tensor, start: int) -> Callable[[], None]:
        """The same through FA3."""
        calls = [fa3(self.pool, query, output, start, row) for row in range(LAYERS)]

        def run() -> None:
            for call in calls:
                call()

        return run

    def time(self, run: Callable[[], None], states: torch.Tensor, repeat: int = 9) -> dict[str, float]:
        """Medians of a layer in milliseconds: `ms` from an idle device on, launches included; `gpu_ms` with all
        launches queued before the first starts; `host_ms` of the calls alone."""
        times: dict[str, list[float]] = {"ms": [], "gpu_ms": [], "host_ms": []}
        for turn in range(2 * repeat + 4):
            self.pool.kv_cache[self.blocks] = states
            queued = turn % 2 == 1
            torch.cuda.synchronize()
            if queued:
                torch.cuda._sleep(20_000_000)  # cycles
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            clock = time.perf_counter()
            run()
            clock = time.perf_counter() - clock
            end.record()
            end.synchronize()
            if turn >= 4:
                times["gpu_ms" if queued else "ms"].append(begin.elapsed_time(end) / LAYERS)
                times["host_ms"].append(clock * 1e3 / LAYERS)
        return {name: statistics.median(values) for name, values in times.items()} | {
            "spread_ms": max(times["ms"]) - min(times["ms"])
        }


def time_chunks(
    op: PrefillPasses, lengths: list[int], starts: list[int], record: Callable[..., None], breakdown: bool
) -> None:
    """Chunks of a prompt far into it, dense and sparse."""
    layers = Layers(op, max(starts) + max(lengths))
    for start in starts:
        states = layers.states(start)
        for length in lengths:
            query = queries(length, "uniform")
            output = torch.full_like(query, float("nan"))
            page, block = op.layer.params.page_size, op.layer.params.selection_block
            where = {"batch": 1, "context": start + length, "chunk": length, "page": page, "block": block,
                     "budget": op.layer.params.budget_blocks * block}  # fmt: skip
            record("fa3", **layers.time(layers.dense(query, output, start), states), **where)
            for _ in range(2):  # as Triton launches it, and as it was bound then
                layers.pool.kv_cache[layers.blocks] = states
                output.fill_(float("nan"))
                layers.sparse(query, output, start, 1)()
            error, ties = check(op, layers.stored, query, output, start, many=False)
            if bool(output.isnan().any()) or not error < TOLERANCE:
                raise RuntimeError(f"{where}: NaN, or relative error {error:.1e}")
            run = layers.sparse(query, output, start)
            timed = layers.time(run, states)
            record("spla", **timed, **where, kind="uniform", error=round(error, 5), near_ties=ties)
            if breakdown:
                layers.pool.kv_cache[layers.blocks] = states
                print_kernels(run, LAYERS)


def print_kernels(run: Callable[[], object], layers: int = 1) -> None:
    """Milliseconds of each kernel of a layer, from the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    for item in sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:12]:
        time_ms, count = item.self_device_time_total / 1e3 / layers, item.count // layers
        print(f"    {time_ms:9.3f} ms {count:5d}  {item.key[:70]}")


def floor_ms(op: PrefillPasses, context: int, flops: float, bandwidth: float) -> float:
    params = op.params
    block, budget, voters = params.selection_block, params.budget_tokens, 1 / params.tile_step
    first = min(op.dense_below, context)
    sparse = context - first
    scored = (context**2 - first**2) / 2 / block  # (token, block) pairs: for masses; of voters twice, for scores
    products = scored * (1 + 2 * voters) * 4 * HEAD_SIZE
    products += sparse * voters * params.candidate_blocks * block * 2 * HEAD_SIZE
    products += sparse * budget * 4 * HEAD_SIZE  # attention, and what is taken from the state, once for a tile's heads
    products += sparse * budget * 2 * HEAD_SIZE * HEAD_SIZE / (params.tile * HEADS // KV_HEADS)
    products = HEADS * (products + first**2 / 2 * 4 * HEAD_SIZE)
    moved = context * (2 * KV_HEADS + 2 * HEADS) * HEAD_SIZE * 2
    return max(products / flops, moved / bandwidth) * 1e3


def plot(path: Path) -> None:
    """Time of a layer over the length of the prompt."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = json.loads(path.read_text())
    figure, axis = pyplot.subplots(figsize=(5.5, 4))
    for impl, label in {"fa3": "FA3, dense", "spla": "SPLA", "floor": "SPLA, floor"}.items():
        rows = [r for r in result["rows"] if r["impl"] == impl and r["budget"] == 2048 and "chunk" not in r]
        points = sorted({r["context"]: r["ms"] for r in rows if r.get("kind", "uniform") == "uniform"}.items())
        axis.loglog(*zip(*points, strict=True), marker="o", label=label, base=2)
    axis.set(xlabel="prompt, tokens", ylabel="one layer, milliseconds", title=result["hardware"]["gpu"])
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)


def make_op(
    context: int,
    budget: int,
    max_num_tokens: int,
    *,
    page: int = 64,
    block: int = 64,
    dense_below: int,
    scratch: int = SCRATCH_BYTES >> 20,
    options: dict | None = None,
    tuning: PrefillTuning | None = None,
) -> PrefillPasses:
    """The op of one row; scratch of others is given back."""
    torch.cuda.empty_cache()
    layer = GpuLayer(SplaParameters(page, block, budget // block, **(DEFAULTS | (options or {}))), LAYER, "cuda")
    sizes = limits(context, max_num_tokens=max_num_tokens, dense_below=dense_below)
    return PrefillPasses(layer, sizes, tuning=tuning, scratch_bytes=scratch << 20)


def limits(max_model_len: int, *, max_num_tokens: int, dense_below: int) -> Limits:
    """Of one row."""
    return Limits(1, 1, max_model_len, max_num_tokens, dense_below, largest_budget=0)


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="8192,16384,32768,65536,131072,524288")
    parser.add_argument("--chunks", default="8,64,512,2048,8192", help="tokens of chunks far into a prompt")
    parser.add_argument(
        "--starts", default="8192,16384,32768,65536,122880", help="where they stand, at least --dense-below"
    )
    parser.add_argument("--budgets", default="2048")
    parser.add_argument("--page", type=int, default=64)
    parser.add_argument("--block", type=int, help="tokens a selection block, a page unless given")
    parser.add_argument("--kinds", default="uniform,drifting,captured")
    parser.add_argument("--dense-below", type=int, default=8192, help="tokens; at least two budgets (%(default)s)")
    parser.add_argument("--scratch", type=int, default=SCRATCH_BYTES >> 20, help="MiB for the parts of a pass")
    parser.add_argument("--options", default="{}", help="parameters of SPLA as JSON")
    parser.add_argument("--tuning", default="{}", help="launch shapes as JSON")
    parser.add_argument("--breakdown", action="store_true", help="time of each kernel, from the profiler")
    parser.add_argument("--quick", action="store_true", help="one length of each, in a minute")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="only draw the rows of this file, as a PNG beside it")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot)
        return
    block = args.block or args.page
    if args.quick:
        args.contexts, args.chunks, args.starts, args.kinds = "32768", "64,2048", "32768", "uniform"
    if block != args.page and "captured" in args.kinds:
        parser.error("captured queries select whole pages: with --block give --kinds without them")
    import triton

    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    with contextlib.suppress(Exception):
        versions["vllm"] = __import__("vllm").__version__
    properties = torch.cuda.get_device_properties(0)
    bandwidth, flops = copy_bandwidth(), matmul_rate()
    hardware = {
        "gpu": properties.name,
        "sms": properties.multi_processor_count,
        "copy_bytes_per_s": round(bandwidth),
        "matmul_flop_per_s": round(flops),
    }
    rows: list[dict] = []

    def record(impl: str, ms: float, spread_ms: float, **where: object) -> None:
        where = {name: round(x, 4) if name.endswith("_ms") else x for name, x in where.items()}
        rows.append({"impl": impl, **where, "ms": round(ms, 4), "spread_ms": round(spread_ms, 4)})
        print(rows[-1], flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            result = {"command": " ".join(["python", *sys.argv]), "versions": versions, "hardware": hardware}
            args.out.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")

    def make(context: int, budget: int, max_num_tokens: int) -> PrefillPasses:
        return make_op(
            context, budget, max_num_tokens, page=args.page, block=block, dense_below=args.dense_below,
            scratch=args.scratch, options=json.loads(args.options), tuning=tuning,
        )  # fmt: skip

    tuning = PrefillTuning(**json.loads(args.tuning)) if args.tuning != "{}" else None
    budgets = numbers(args.budgets)
    if args.chunks:
        lengths, starts = numbers(args.chunks), numbers(args.starts)
        for budget in budgets:
            op = make(max(starts) + max(lengths), budget, 8192)
            time_chunks(op, lengths, starts, record, args.breakdown)
            del op
    for context in numbers(args.contexts):
        for budget in budgets:
            op = make(context, budget, context)
            pool = Pool(op.layer, context, 1)
            where = {"batch": 1, "context": context, "budget": budget, "page": args.page, "block": block}
            print(
                f"{where}: scratch {op.scratch_bytes / 2**20:.0f} MiB, {op.planner.max_groups} groups a pass",
                flush=True,
            )
            record("floor", floor_ms(op, context, flops, bandwidth), 0.0, **where)
            for kind in args.kinds.split(","):
                query = inputs(pool, context, kind)
                output = torch.full_like(query, float("nan"))
                if kind == args.kinds.split(",")[0]:
                    record("fa3", *time_calls(fa3(pool, query, output)), **where)
                    output.fill_(float("nan"))
                run = spla(op, pool, query, output)
                run()
                error, ties = check(op, stored(pool), query, output) if context > op.dense_below else (0.0, 0)
                if bool(output.isnan().any()) or not error < TOLERANCE:
                    raise RuntimeError(f"{where}, {kind}: NaN, or relative error {error:.1e}")
                record("spla", *time_calls(run), **where, kind=kind, error=round(error, 5), near_ties=ties)
                if args.breakdown:
                    print_kernels(run)
    print(f"{'context':>8} {'budget':>6} {'floor':>9} {'fa3':>9} {'kind':>9} {'spla':>9}  fa3/spla")
    for row in rows:
        if row["impl"] == "spla" and "chunk" not in row:
            same = {r["impl"]: r["ms"] for r in rows if "chunk" not in r
                    and (r["context"], r["budget"]) == (row["context"], row["budget"])}  # fmt: skip
            ratio = same.get("fa3", math.nan) / row["ms"]
            print(
                f"{row['context']:8d} {row['budget']:6d} {same['floor']:9.2f} {same['fa3']:9.2f} {row['kind']:>9} "
                f"{row['ms']:9.2f}  {ratio:6.2f}"
            )
    columns = "start   chunk    fa3 gpu   host    spla    gpu   host (ms a layer)  fa3/spla"
    print(columns if args.chunks else "", end="\n" if args.chunks else "")
    for dense, sparse in itertools.pairwise(r for r in rows if "chunk" in r):
        if sparse["impl"] == "spla":
            cells = (f"{r['ms']:7.3f} {r['gpu_ms']:6.3f} {r['host_ms']:6.3f}" for r in (dense, sparse))
            start = sparse["context"] - sparse["chunk"]
            print(f"{start:6d} {sparse['chunk']:6d} {' '.join(cells)}  {dense['ms'] / sparse['ms']:6.2f}")


if __name__ == "__main__":
    main()
