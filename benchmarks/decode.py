"""Time a decode step of one attention layer: FA3 and FlashInfer dense, FlashInfer over sparse tables, SPLA, the floor.

    python benchmarks/decode.py --out benchmarks/results/decode_h200.json
    python benchmarks/decode.py --quick --impls fa3,spla
    python benchmarks/decode.py --quick --impls fa3,spla --candidates 12288 --breakdown
    python benchmarks/decode.py --contexts 131072 --batches 1,8,32 --budgets 1024,2048 --pages 64 --blocks 64,32,16 \
        --selectors rem,km2-rem --statistics auto --fine-block 0 --impls fa3,spla \
        --out benchmarks/results/decode_blocks_h200.json
    python benchmarks/decode.py --plot benchmarks/results/decode_blocks_h200.json \
        --losses benchmarks/results/quality_perplexity_cpu.json benchmarks/results/quality_perplexity_fine.json

Every implementation reads the same paged cache in the same process. A measurement is a CUDA graph of several decode
steps in a row, as a model's layers are, each on rows of its own, so that the data of the steps together exceeds twice
the L2 cache; it is replayed, and the median of a step and the spread (10th to 90th percentile) are reported. Data are
random. Before anything is timed its output is checked: FA3 and FlashInfer against a float64 softmax, SPLA against the
float64 reference at batch 1, and at larger batches against the same rows at batch 1.

    fa3                 FlashAttention 3 over all pages
    flashinfer_dense    FlashInfer (tensor cores) over all pages
    flashinfer_sparse   FlashInfer over the pages that SPLA selected: exact part alone, no scores, no selection
    spla                the whole of a SPLA step of a decoding batch: statistics of earlier steps are asked for while
                        the launch ahead ends, which here is the step before
    spla_mixed          the same as in a step that holds prompt tokens too, where everything waits for the launch ahead
    spla_one_level      as `spla`, with the option `fine_block_size: 0`; with --fine-block 0 `spla` is that
    spla_flashinfer     a step in one level with the option `executor: flashinfer`; not among the defaults
    floor               bytes that a steady step has to move (statistics of all complete pages, sketches of candidates,
                        selected blocks, float32 state) over the bandwidth of a large device-to-device copy measured in
                        the same run; `floor_one_level` likewise
    spla/KERNEL         with --breakdown: time of each kernel of a step, from the profiler. Kernels that are launched
                        before their predecessor ends count their waiting

One cache serves all contexts and batches of a page size: rows are cut from its pages in random order.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.reference import spla_token
from spla_backend.algorithm.selectors import get_selector
from spla_backend.algorithm.sketch import FINE_SOURCES
from spla_backend.evaluate.variants import bytes_read
from spla_backend.kernels.gpu.decode.steps import DecodeSteps
from spla_backend.kernels.gpu.layer import GpuLayer
from spla_backend.kernels.interface import Layer, Limits

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
GROUP = HEADS // KV_HEADS
DTYPE = torch.bfloat16
SCALE = HEAD_SIZE**-0.5
L2_BYTES = 60e6
MAX_STEPS = 16  # steps a graph
SECONDS = 0.12  # a measurement, where that is enough for 7 replays
CHECKED_CONTEXT = 131072  # beyond it the reference takes seconds: one shape is checked there
TOLERANCE = 1e-2
DEVICE = "cuda"
LAYER = Layer(HEADS, KV_HEADS, HEAD_SIZE, DTYPE, SCALE)

DENSE = ("fa3", "flashinfer_dense")
TWO_LEVELS = ("fine_block", "candidates", "fine_source")
IMPLS = (*DENSE, "flashinfer_sparse", "spla", "spla_mixed", "spla_one_level")
ONE_LEVEL = ("spla_one_level", "spla_flashinfer")
Run = Callable[["Rows"], None]


@dataclass(frozen=True)
class Shape:
    """What is measured."""

    batch: int
    context: int
    budget: int  # tokens
    page: int
    block: int  # tokens a selection block
    selector: str = "rem"
    statistics_dtype: str = "fp8"
    fine_block: int = 0  # tokens a fine block; 0: one level
    candidates: int = 0  # tokens of the fine level, at least
    fine_source: str = "keys"

    @property
    def budget_blocks(self) -> int:
        return self.budget // self.block

    @property
    def budget_pages(self) -> int:
        return self.budget // self.page

    @property
    def params(self) -> SplaParameters:
        return SplaParameters(
            self.page,
            self.block,
            self.budget_blocks,
            selector=self.selector,
            statistics_dtype=self.statistics_dtype,
            fine_block=self.fine_block,
            least_candidates=self.candidates // self.block,
            fine_source=self.fine_source,
        )

    def op(self, executor: str = "spla") -> DecodeSteps:
        limits = Limits(
            max_num_rows=self.batch,
            max_query_len=1,
            max_model_len=max(self.context, 131072),  # an engine's limit does not follow the length of its rows
            max_num_tokens=self.batch,
            prefill_dense_below=0,
            largest_budget=self.budget_blocks,
        )
        return DecodeSteps(GpuLayer(self.params, LAYER, DEVICE), limits, executor=executor)


@dataclass
class Rows:
    """One step's rows."""

    first: int  # the first row's number in the pool
    query: torch.Tensor  # [batch, H, d]
    block_table: torch.Tensor  # [batch, pages] int32
    state_table: torch.Tensor  # [batch, K] int32
    output: torch.Tensor  # [batch, H, d]
    selected: torch.Tensor | None = None  # [batch * G * budget_pages] int32, ids of SPLA's page tables


class Pool:
    """A cache of random pages with statistics and stamps in place, in random order.

    Args:
        layer: Whose pages.
        context: Tokens a row.
        num_rows: Rows.
        num_states: Recurrent states, for when the pages are cut into more rows.
        state_blocks: Blocks of a state, where another layer's states take more.
    """

    def __init__(
        self, layer: GpuLayer, context: int, num_rows: int, num_states: int = 1, state_blocks: int = 0
    ) -> None:
        self.layer, layout, page = layer, layer.page_layout, layer.params.page_size
        per_row, num_blocks = -(-context // page), max(layer.state_layout.num_blocks, state_blocks)
        num_states = max(num_rows, num_states)
        num_pages = num_rows * per_row + num_states * num_blocks
        self.kv_cache = torch.empty(num_pages, KV_HEADS, layout.rows, 2 * HEAD_SIZE, dtype=DTYPE, device=DEVICE)
        words = self.kv_cache.view(torch.int32).flatten(2)  # [num_pages, G, words]
        selector = get_selector(layer.params.selector)
        for start in range(0, num_pages, 1024):
            part = self.kv_cache[start : start + 1024]
            part.normal_()
            keys, area = part[:, :, :page, :HEAD_SIZE].float(), layout.area(part)
            layout.store(area, selector.statistics(keys.unflatten(2, (-1, layer.params.selection_block))))
            if layout.has_sketch:
                layout.store_sketch(area, keys)
            ids = torch.arange(start, start + len(part), dtype=torch.int32, device=DEVICE)
            words[start : start + 1024, :, -4:] = ids[:, None, None]
        order = torch.randperm(num_pages, device=DEVICE).to(torch.int32)
        # States overwrite their pages, which are therefore nobody's page in any cut.
        self.block_table = order[: num_rows * per_row].view(num_rows, per_row)
        self.state_table = order[num_rows * per_row :].view(num_states, num_blocks)
        self.query = torch.randn(4096, HEADS, HEAD_SIZE, device=DEVICE).to(DTYPE)  # of row 0, 1, ...

    def steps(self, shape: Shape) -> list[Rows]:
        """Steps of rows cut anew from all pages, which together read more than twice the L2 as far as the pool goes."""
        per_row = -(-shape.context // shape.page)
        num_rows = min(self.block_table.numel() // per_row, len(self.state_table))
        fit = num_rows // shape.batch
        wanted = -(-int(2 * L2_BYTES) // (shape.batch * spla_bytes(shape)))
        table = self.block_table.flatten()[: num_rows * per_row].view(num_rows, per_row)
        out = []
        for start in range(0, min(fit, max(2, wanted), MAX_STEPS) * shape.batch, shape.batch):
            rows = slice(start, start + shape.batch)
            query = self.query[rows].clone()
            output = torch.full_like(query, float("nan"))
            out.append(Rows(start, query, table[rows].clone(), self.state_table[rows].clone(), output))
        return out


def spla_bytes(shape: Shape) -> int:
    """Bytes that a steady SPLA step must move for one row."""
    return KV_HEADS * bytes_read(shape.params, shape.context, HEAD_SIZE)


def time_steps(run: Run, steps: list[Rows]) -> tuple[float, float, torch.cuda.CUDAGraph, int]:
    """Median and spread in microseconds of one step; a graph of steps, and how many it has."""
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for rows in steps:
        run(rows)
    end.record()
    end.synchronize()
    slow = begin.elapsed_time(end) > 1e3 * SECONDS / 8
    repeat = 1 if slow else max(1, 8 // len(steps))
    num_steps = repeat * len(steps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for rows in steps:
                run(rows)
    times: list[float] = []
    warm = 2
    while len(times) < 7 + warm or (len(times) < 40 + warm and sum(times) < 1e3 * SECONDS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    us = sorted(t * 1e3 / num_steps for t in times[warm:])
    return statistics.median(us), us[int(0.9 * len(us))] - us[int(0.1 * len(us))], graph, num_steps


def kernel_times(graph: torch.cuda.CUDAGraph, num_steps: int) -> dict[str, float]:
    """Microseconds a step of each kernel in a graph of `num_steps` steps."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    total: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_time == 0:  # of the host
            continue
        total[event.name.split("(")[0].split("<")[0].replace("void ", "")] += event.device_time / num_steps
    return dict(total)


# Implementations. Whatever they plan or compile is done before the function that they return is timed.


def spla(op: DecodeSteps, pool: Pool, shape: Shape, steady: bool = True) -> Run:
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=DEVICE)

    def run(rows: Rows) -> None:
        op.decode(
            rows.query, pool.kv_cache, pool.kv_cache, starts, lengths, rows.block_table, rows.state_table,
            rows.output, 1, steady,
        )  # fmt: skip

    return run


def fa3(pool: Pool, shape: Shape) -> Run:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    page, batch = shape.page, shape.batch
    keys, values = (x.transpose(1, 2) for x in pool.kv_cache[:, :, :page].split(HEAD_SIZE, -1))  # [pages, B, G, d]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((batch,), shape.context, dtype=torch.int32, device=DEVICE)
    metadata = get_scheduler_metadata(
        batch_size=batch, max_seqlen_q=1, max_seqlen_k=shape.context, num_heads_q=HEADS, num_heads_kv=KV_HEADS,
        headdim=HEAD_SIZE, cache_seqlens=lengths, qkv_dtype=DTYPE, cu_seqlens_q=starts, page_size=page, causal=True,
    )  # fmt: skip

    def run(rows: Rows) -> None:
        flash_attn_varlen_func(
            q=rows.query, k=keys, v=values, out=rows.output, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lengths,
            max_seqlen_k=shape.context, softmax_scale=SCALE, causal=True, block_table=rows.block_table, fa_version=3,
            scheduler_metadata=metadata,
        )  # fmt: skip

    return run


_workspace: list[torch.Tensor] = []  # of FlashInfer, one for all


def flashinfer(pool: Pool, shape: Shape, sparse: bool) -> Run:
    """Dense: a request a row. Sparse: a request a (row, kv head), over the tables that SPLA left in `Rows.selected`."""
    import flashinfer

    if not _workspace:
        _workspace.append(torch.zeros(256 << 20, dtype=torch.uint8, device=DEVICE))
    page, cache = shape.page, pool.kv_cache
    requests, per_request, heads, kv_heads = shape.batch, -(-shape.context // page), HEADS, KV_HEADS
    if sparse:
        cache = cache.view(-1, 1, *cache.shape[2:])  # [pages * G, 1, B + r, 2 d]
        requests, per_request, heads, kv_heads = shape.batch * KV_HEADS, shape.budget_pages, GROUP, 1
    kv = cache[:, :, :page].split(HEAD_SIZE, -1)  # HND
    indptr = torch.arange(requests + 1, dtype=torch.int32) * per_request
    last = torch.full((requests,), (shape.context - 1) % page + 1, dtype=torch.int32)
    indices = torch.zeros(requests * per_request, dtype=torch.int32, device=DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace[0],
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=indptr.to(DEVICE),
        paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=last.to(DEVICE),
    )
    wrapper.plan(
        indptr, indices, last, heads, kv_heads, HEAD_SIZE, page, q_data_type=DTYPE, kv_data_type=DTYPE,
        sm_scale=SCALE,
    )  # fmt: skip

    def run(rows: Rows) -> None:
        # The wrapper reads its own index buffer: instead of copying the step's table there, give it the table.
        table = rows.selected if sparse else rows.block_table.view(-1)
        assert table is not None and table.numel() == indices.numel()
        wrapper._paged_kv_indices_buf = table
        wrapper.run(rows.query.view(requests, heads, HEAD_SIZE), kv, out=rows.output.view(requests, heads, HEAD_SIZE))

    return run


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and written bytes counted."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device=DEVICE).random_()
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


# Checks


class WrongOutputError(RuntimeError):
    """What is wrong is not timed."""


def relative_error(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Over the last two dimensions; NaN is infinite."""
    difference = (got.double() - want.double()).flatten(-2).norm(dim=-1)
    return (difference / want.double().flatten(-2).norm(dim=-1)).nan_to_num(torch.inf)


def check_exact(pool: Pool, shape: Shape, rows: Rows, impl: str) -> None:
    """The first row's first head of each group against a float64 softmax over all pages, or over those selected."""
    pages = rows.block_table[0][None].expand(KV_HEADS, -1)
    if impl == "flashinfer_sparse":
        assert rows.selected is not None
        pages = rows.selected.view(shape.batch, KV_HEADS, -1)[0] // KV_HEADS
    for head in range(KV_HEADS):  # one at a time: a long row in float64 is large
        kv = pool.kv_cache[pages[head].long(), head, : shape.page].flatten(0, 1)  # [tokens, 2 d]
        missing = -shape.context % shape.page  # tokens of the last page that do not exist
        keys, values = kv[: len(kv) - missing].double().split(HEAD_SIZE, -1)
        want = torch.softmax(keys @ rows.query[0, head * GROUP].double() * SCALE, 0) @ values
        error = float(relative_error(rows.output[0, head * GROUP][None], want[None]))
        if error > TOLERANCE:
            raise WrongOutputError(f"{impl} {shape}: relative error {error}")


def least_gap(scores: torch.Tensor, budget: int, forced: int) -> float:
    """Between scores around the last that is selected; forced blocks may be among the best."""
    free = budget - forced
    around = scores.sort(descending=True).values[max(free - 1, 0) : budget + 1]
    return float(around.diff().abs().min()) if len(around) > 1 else 1.0


def check_spla(op: DecodeSteps, pool: Pool, shape: Shape, rows: Rows) -> None:
    """The first row's first kv head against the float64 reference."""
    pages = rows.block_table[0].long()
    kv = pool.kv_cache[pages, :1].cpu()  # [pages, 1, B + r, 2 d]
    tokens = kv[:, :, : shape.page].transpose(1, 2).flatten(0, 1)[: shape.context].double()
    keys, values = tokens.split(HEAD_SIZE, -1)  # [L, 1, d]
    complete = kv[: (shape.context - 1) // shape.page]
    block_statistics = op.layer.page_layout.statistics(complete).transpose(1, 2).flatten(0, 1).double()
    query = rows.query[0, :GROUP].cpu().double() * SCALE
    want = spla_token(query, keys, values, op.layer.params, statistics=block_statistics)
    error = float(relative_error(rows.output[0, :GROUP].cpu(), want.output))
    if error > TOLERANCE:
        params = op.layer.params
        per_block = params.selection_block // params.attended_block
        levels = [(want.group_scores[0], params.candidate_blocks or params.budget_blocks, params.max_forced_blocks)]
        if params.fine_block and want.fine_scores[0]:
            fine = torch.stack(list(want.fine_scores[0].values()))
            levels.append((fine, params.budget_blocks * per_block, params.max_forced_blocks * per_block))
        if min(least_gap(*level) for level in levels) > 1e-5:  # where float32 cannot tell two blocks apart, either may
            raise WrongOutputError(f"spla {shape}: relative error {error}")


class Benchmark:
    """Measurements of a run, added to those that its file has already."""

    def __init__(
        self, out: Path | None, impls: list[str], breakdown: bool, append: bool, two_levels: dict[str, Any]
    ) -> None:
        import triton

        self.out, self.impls, self.breakdown, self.two_levels = out, impls, breakdown, two_levels
        command = " ".join(["python", *sys.argv])
        self.rows: dict[tuple, dict] = {}
        self.failures: list[str] = []
        if append and out and out.exists():
            before = json.loads(out.read_text())
            command = f"{before['command']} && {command}"
            for row in before["rows"]:
                self._keep(row)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
        for name in ("vllm", "flashinfer"):
            with contextlib.suppress(Exception):
                versions[name] = __import__(name).__version__
        properties = torch.cuda.get_device_properties(0)
        self.bandwidth = copy_bandwidth()
        torch.cuda.empty_cache()
        hardware = {
            "gpu": properties.name,
            "sms": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "copy_bytes_per_s": round(self.bandwidth),
        }
        self.about = {"command": command, "versions": versions, "hardware": hardware}
        self._alone: dict[tuple[int, int], dict[int, torch.Tensor]] = {}  # SPLA's outputs of single rows

    def _keep(self, row: dict) -> None:
        self.rows[row["impl"], row["context"], *where(row), *(row.get(name) for name in TWO_LEVELS)] = row

    def record(self, impl: str, shape: Shape, us: float, spread: float) -> None:
        about = {name: x for name, x in vars(shape).items() if shape.fine_block or name not in TWO_LEVELS}
        self._keep({"impl": impl, **about, "us": round(us, 2), "spread_us": round(spread, 2)})

    def save(self) -> None:
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps({**self.about, "rows": list(self.rows.values())}, indent=1) + "\n")

    def measure(self, impl: str, run: Run, steps: list[Rows], *shapes: Shape) -> None:
        us, spread, graph, num_steps = time_steps(run, steps)
        for shape in shapes:
            self.record(impl, shape, us, spread)
        if self.breakdown and impl.startswith("spla"):
            for kernel, time in kernel_times(graph, num_steps).items():
                self.record(f"{impl}/{kernel}", shapes[0], time, 0.0)

    def dense(self, pool: Pool, steps: list[Rows], shapes: list[Shape]) -> None:
        """Dense attention, whatever the budget."""
        for impl in DENSE:
            if impl in self.impls:
                run = fa3(pool, shapes[0]) if impl == "fa3" else flashinfer(pool, shapes[0], sparse=False)
                run(steps[0])
                check_exact(pool, shapes[0], steps[0], impl)
                self.measure(impl, run, steps, *shapes)

    def sparse(self, pool: Pool, steps: list[Rows], shape: Shape, check: bool) -> None:
        default = replace(shape, **self.two_levels)
        self.record("floor", default, shape.batch * spla_bytes(default) / self.bandwidth * 1e6, 0.0)
        if self.two_levels:
            self.record("floor_one_level", shape, shape.batch * spla_bytes(shape) / self.bandwidth * 1e6, 0.0)
        of_pages = shape.block == shape.page
        in_one_level = "spla_one_level" if self.two_levels else "spla"
        for impl in dict.fromkeys(("spla", "spla_mixed", in_one_level, *(["spla_flashinfer"] if of_pages else []))):
            tables = impl == in_one_level and "flashinfer_sparse" in self.impls  # FlashInfer reads those of SPLA
            if impl not in self.impls and not tables:
                continue
            levels = shape if impl in ONE_LEVEL else default
            op = levels.op("flashinfer" if impl == "spla_flashinfer" else "spla")
            run = spla(op, pool, levels, steady=impl != "spla_mixed")
            if op.fused:
                choosing_bytes, op.fused.choosing_bytes = op.fused.choosing_bytes, 0  # the reference selects
            for rows in steps:
                rows.output.fill_(float("nan"))
                run(rows)
                if tables and shape.context > shape.budget and of_pages:
                    rows.selected = op.page_table[: shape.batch, :, : shape.budget_pages].flatten()
            self._check(op, pool, steps, levels, check)
            if op.fused:
                op.fused.choosing_bytes = choosing_bytes
            if impl in self.impls:
                self.measure(impl, run, steps, levels)
        if "flashinfer_sparse" in self.impls and shape.context > shape.budget and of_pages:
            run = flashinfer(pool, shape, sparse=True)
            run(steps[0])
            check_exact(pool, shape, steps[0], "flashinfer_sparse")
            self.measure("flashinfer_sparse", run, steps, shape)

    def _check(self, op: DecodeSteps, pool: Pool, steps: list[Rows], shape: Shape, check: bool) -> None:
        """The first row against the reference; all rows that were computed alone against those."""
        if check:
            check_spla(op, pool, shape, steps[0])
        alone = self._alone.setdefault((shape.budget, shape.fine_block), {})
        errors = []
        for rows in steps:
            if bool(rows.output.isnan().any()):
                raise WrongOutputError(f"spla {shape}: NaN")
            for row, output in enumerate(rows.output, rows.first):
                if shape.batch == 1:
                    alone.setdefault(row, output.clone())
                if row in alone:
                    heads = (x.view(KV_HEADS, GROUP, HEAD_SIZE) for x in (output, alone[row]))
                    errors.append(relative_error(*heads))
        # Another split of the work rounds scores in another way, and blocks that are level may change places.
        wrong = float((torch.cat(errors) > TOLERANCE).double().mean()) if errors else 0.0
        if wrong > 0.02:
            raise WrongOutputError(f"spla {shape}: {wrong:.1%} of the heads differ from those of single rows")

    @contextlib.contextmanager
    def _wrong_outputs_noted(self) -> Iterator[None]:
        try:
            yield
        except WrongOutputError as error:
            self.failures.append(str(error))
            print(error, flush=True)

    def run(
        self,
        kinds: list[tuple[int, int, str, str]],
        contexts: list[int],
        batches: list[int],
        budgets: list[int],
        rows: int = 0,
    ) -> None:
        """`kinds`: page, selection block, selector, dtype of the statistics. `rows`: of the longest context that the
        cache has pages for, 0 as many as are of use."""
        for kind in kinds:
            pool = None  # before the next one
            torch.cuda.empty_cache()
            largest, longest = Shape(max(batches), max(contexts), budgets[0], *kind), max(contexts)
            # Pages of two levels hold all that one level reads.
            layer = GpuLayer(replace(largest, **self.two_levels).params, LAYER, DEVICE)
            op = largest.op()  # its scratch, which stays, is there when the pool takes what is left
            row_bytes = longest * KV_HEADS * layer.page_layout.rows // kind[0] * 2 * HEAD_SIZE * DTYPE.itemsize
            free = torch.cuda.mem_get_info()[0] - 6e9
            num_rows = min(int(free / row_bytes), rows or max(2 * max(batches), MAX_STEPS))
            pool = Pool(layer, longest, num_rows, MAX_STEPS * max(batches), op.layer.state_layout.num_blocks)
            for context in contexts:
                self._alone.clear()
                for batch in batches:
                    shapes = [Shape(batch, context, budget, *kind) for budget in budgets]
                    steps = pool.steps(shapes[0])
                    if not steps:
                        print("skipped, does not fit into memory:", shapes[0], flush=True)
                        continue
                    with self._wrong_outputs_noted():
                        self.dense(pool, steps, shapes)
                    for shape in shapes:
                        known = context <= CHECKED_CONTEXT or (kind[0] == 64 and shape.budget == budgets[0])
                        with self._wrong_outputs_noted():
                            self.sparse(pool, steps, shape, check=batch == batches[0] and known)
                self.save()
                print("page {}, blocks of {}, {}, statistics {}, context {}: done".format(*kind, context), flush=True)


def compile_shape(executors: list[str], shape: Shape) -> None:
    """Run a step of a shape on next to nothing, so that its kernels are compiled and cached on disk."""
    for executor in executors:
        if executor == "flashinfer" and shape.fine_block:
            continue
        op = shape.op(executor)
        blocks = op.layer.state_layout.num_blocks
        cache = op.layer.empty_pages(3 + blocks)
        query = op.layer.zeros(shape.batch, HEADS, HEAD_SIZE)
        width = -(-shape.context // shape.page)
        tables = (torch.zeros(shape.batch, n, dtype=torch.int32, device=DEVICE) for n in (width, blocks))
        starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE)
        lengths = torch.ones(shape.batch, dtype=torch.int32, device=DEVICE)
        op.decode(query, cache, cache, starts, lengths, *tables, torch.empty_like(query), 1)
        torch.cuda.synchronize()


def warm_up(shapes: list[Shape], impls: list[str], processes: int) -> None:
    """Compile the kernels of many shapes side by side; one after the other they take minutes."""
    executors = [executor for executor, impl in (("spla", "spla"), ("flashinfer", "spla_flashinfer")) if impl in impls]
    different = {(*where(vars(s)), s.fine_block, max(s.context, 131072)): s for s in shapes}.values()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(functools.partial(compile_shape, executors), different))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="4096,8192,16384,32768,65536,131072,524288")
    parser.add_argument("--batches", default="1,4,8,32")
    parser.add_argument("--budgets", default="2048,1024,4096")
    parser.add_argument("--pages", default="64,32,128")
    parser.add_argument("--blocks", default="0", help="tokens a selection block; 0: a page")
    parser.add_argument("--selectors", default="rem")
    parser.add_argument("--statistics", default="fp8", help="how statistics are stored")
    parser.add_argument("--fine-block", type=int, default=16, help="tokens a fine block; 0: one level")
    parser.add_argument("--candidates", type=int, default=8192, help="tokens, two budgets at least")
    parser.add_argument("--fine-source", default="int4", choices=FINE_SOURCES, help="what the fine level reads")
    parser.add_argument("--impls", default=",".join(IMPLS))
    parser.add_argument("--quick", action="store_true", help="16K and 128K, batches 1, 8, 32, budget 2048, page 64")
    parser.add_argument("--breakdown", action="store_true", help="time the kernels of SPLA apart")
    parser.add_argument("--rows", type=int, default=0, help="of the longest context in the cache; 0: as many as fit")
    parser.add_argument("--warm-up", type=int, default=0, metavar="N", help="compile in N processes first")
    parser.add_argument("--append", action="store_true", help="add to the rows that the file has already")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="only draw the rows of this file, as PNG files beside it")
    parser.add_argument("--losses", type=Path, nargs="+", help="plot instead: loss in these reports against its times")
    args = parser.parse_args()
    if args.plot:
        if args.losses:
            plot_losses(args.plot, args.losses)
        else:
            plot(args.plot)
        return
    if args.quick:
        args.contexts, args.batches, args.budgets, args.pages = "16384,131072", "1,8,32", "2048", "64"
    pages, contexts, batches, budgets = (
        [int(x) for x in text.split(",")] for text in (args.pages, args.contexts, args.batches, args.budgets)
    )
    blocks = [int(x) for x in args.blocks.split(",")]
    kinds = [
        (page, block or page, selector, statistics_dtype)
        for selector in args.selectors.split(",")
        for page in pages
        for block in blocks
        for statistics_dtype in args.statistics.split(",")
    ]
    impls = args.impls.split(",")
    unknown = set(impls) - {*IMPLS, "spla_flashinfer"}
    if unknown:
        parser.error(f"unknown implementations {', '.join(unknown)}")
    two_levels = (
        {"fine_block": args.fine_block, "candidates": args.candidates, "fine_source": args.fine_source}
        if args.fine_block
        else {}
    )
    if args.warm_up:
        shapes = [Shape(b, c, t, *kind) for kind in kinds for c in contexts for b in batches for t in budgets]
        if two_levels:
            one_level = shapes if "spla_one_level" in impls else []
            shapes = [*one_level, *(replace(shape, **two_levels) for shape in shapes)]
        warm_up(shapes, impls, args.warm_up)
    benchmark = Benchmark(args.out, impls, args.breakdown, args.append, two_levels)
    benchmark.run(kinds, contexts, batches, budgets, args.rows)
    print_tables(list(benchmark.rows.values()))
    if benchmark.failures:
        sys.exit("wrong outputs, not timed:\n" + "\n".join(benchmark.failures))


def print_tables(rows: list[dict]) -> None:
    """Microseconds of the first kind, then the ratio of FA3 to SPLA, and SPLA's microseconds, of all of them."""
    us: dict[tuple, dict[str, float]] = defaultdict(dict)
    for row in rows:
        batch, *kind = where(row)
        us[tuple(kind), row["context"], batch][row["impl"]] = row["us"]
    first = next(iter(us))[0]
    names = list(dict.fromkeys(row["impl"] for row in rows if "/" not in row["impl"]))
    print("budget {}, page {}, blocks of {}, {}, statistics {}, microseconds".format(*first))
    print(
        f"{'context':>7} {'batch':>5}",
        *(f"{name.replace('flashinfer', 'fi').replace('one_level', '1'):>9}" for name in names),
        "fa3/spla",
    )
    for (kind, context, batch), found in us.items():
        if kind == first:
            cells = " ".join(f"{found.get(name, math.nan):9.1f}" for name in names)
            print(f"{context:7d} {batch:5d} {cells} {found.get('fa3', math.nan) / found.get('spla', math.nan):8.2f}")
            parts = [f"{name.split('/')[1]} {time:.1f}" for name, time in found.items() if "/" in name]
            if parts:
                print("        ", ", ".join(parts))
    kinds = list(dict.fromkeys(key[0] for key in us))
    if len(kinds) < 2:
        return
    contexts, batches = sorted({key[1] for key in us}), sorted({key[2] for key in us})
    print(f"fa3/spla, and microseconds of spla, at batches {'/'.join(map(str, batches))}")
    print("budget page block selector statistics", *(f"{context:>36}" for context in contexts))
    for kind in kinds:
        cells = []
        for context in contexts:
            at = [us.get((kind, context, batch), {}) for batch in batches]
            ratios = "/".join(f"{f.get('fa3', math.nan) / f.get('spla', math.nan):.1f}" for f in at)
            cells.append(f"{ratios}  {'/'.join(format(f.get('spla', math.nan), '.1f') for f in at)}")
        print("{:6d} {:4d} {:5d} {:9s} {:9s} ".format(*kind), *(f"{cell:>36}" for cell in cells))


NAMES = {
    "fa3": "FA3, dense",
    "flashinfer_dense": "FlashInfer, dense",
    "flashinfer_sparse": "FlashInfer, selected pages only, no selection",
    "spla": "SPLA",
    "floor": "SPLA, byte floor",
    "spla_one_level": "SPLA in one level",
}


def plot(path: Path) -> None:
    """Time over context for each batch at budget 2048 and page 64; the ratio to FA3 by batch, by budget and by page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = json.loads(path.read_text())
    rows = [r for r in result["rows"] if r.get("run", 0) == 0]
    us: dict[tuple[Any, ...], float] = {(r["impl"], r["context"], *where(r)): r["us"] for r in rows}
    batches = sorted({r["batch"] for r in rows})
    gpu = result["hardware"]["gpu"]

    def points(impl: str, batch: int, budget: int = 2048, page: int = 64) -> list[tuple[int, float]]:
        wanted = (impl, batch, budget, page, page, "rem", "fp8")
        return sorted((key[1], value) for key, value in us.items() if (key[0], *key[2:]) == wanted)

    figure, axes = pyplot.subplots(1, len(batches), figsize=(4 * len(batches), 4), sharey=True, squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        for color, (impl, label) in enumerate(NAMES.items()):
            if points(impl, batch):
                axis.loglog(*zip(*points(impl, batch), strict=True), marker="o", label=label, color=f"C{color}", base=2)
        axis.set(title=f"batch {batch}", xlabel="context, tokens")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("one layer, microseconds")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"Decode attention, H=32 G=8 d=128 bf16, budget 2048 tokens, page 64, {gpu}")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)

    panels = {
        "budget 2048, page 64": {f"batch {b}": (b, 2048, 64) for b in batches},
        "batch 8, page 64": {f"budget {t}": (8, t, 64) for t in sorted({r["budget"] for r in rows})},
        "batch 8, budget 2048": {f"page {p}": (8, 2048, p) for p in sorted({r["page"] for r in rows})},
    }
    panels = {title: lines for title, lines in panels.items() if len(lines) > 1}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, at in lines.items():
            dense, ours = dict(points("fa3", *at)), dict(points("spla", *at))
            both = sorted(dense.keys() & ours.keys())
            axis.loglog(both, [dense[c] / ours[c] for c in both], marker="o", label=label, base=2)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xlabel="context, tokens", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0, 0].set_ylabel(f"FA3 time / SPLA time, {gpu}")
    figure.tight_layout()
    figure.savefig(path.with_name(path.stem + "_ratio.png"), dpi=130)


def plot_losses(path: Path, reports: list[Path]) -> None:
    """Loss of `spla-eval perplexity`, residual `regression`, against time at the longest context, for each batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses: dict[tuple[str, int, int], tuple[float, float]] = {}  # by selector, block, budget: loss, standard error
    for report in map(json.loads, map(Path.read_text, reports)):
        variants = {name: options or {"residual": "dense"} for name, options in report["settings"]["variants"].items()}
        last = max(row["end"] for row in report["rows"])
        for row in report["rows"]:
            options = variants[row["variant"]]
            if row["file"] == "all" and row["end"] == last and set(options) <= {
                "selector", "selection_block_size", "budget", "residual",
            } and options.get("residual", "regression") == "regression":  # fmt: skip
                kind = options.get("selector", "rem"), options.get("selection_block_size", 64), options["budget"]
                losses[kind] = row["difference"], row["difference_se"]
    result = json.loads(path.read_text())
    context = max(row["context"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["context"] == context]
    batches = sorted({row["batch"] for row in rows})
    figure, axes = pyplot.subplots(1, len(batches), figsize=(4.5 * len(batches), 4), sharey=True, squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        for row in rows:
            _, budget, _, block, selector, statistics_dtype = where(row)
            if (
                row["impl"] == "spla"
                and statistics_dtype == "auto"
                and row["batch"] == batch
                and (selector, block, budget) in losses
            ):
                loss, error = losses[selector, block, budget]
                axis.errorbar(row["us"], loss, error, marker="o", capsize=3)
                axis.annotate(f" {selector} {block}", (row["us"], loss), fontsize=8)
        dense = [row["us"] for row in rows if row["impl"] == "fa3" and row["batch"] == batch]
        axis.set(xlabel="one layer, microseconds", title=f"batch {batch} (FA3 {min(dense):.0f})")
        axis.set_xlim(0, 1.3 * axis.get_xlim()[1])
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("loss above dense, nats a token")
    figure.suptitle(f"Loss of SmolLM2-135M at 8K against decode time at {context} tokens, {result['hardware']['gpu']}")
    figure.tight_layout()
    figure.savefig(path.with_name(path.stem + "_loss.png"), dpi=130)


def where(row: dict) -> tuple[int, int, int, int, str, str]:
    """Batch, budget, page, selection block, selector, dtype of the statistics; files from before the last three hold
    pages, `rem` and `auto`."""
    block, selector = row.get("block", row["page"]), row.get("selector", "rem")
    return row["batch"], row["budget"], row["page"], block, selector, row.get("statistics_dtype", "auto")


if __name__ == "__main__":
    main()
