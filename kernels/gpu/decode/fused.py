"""SPLA decode of one layer in one launch, for the shapes that most models have: `fused.cu`, compiled with NVRTC.

For long rows in small batches it is two: the scores are made by a launch ahead, on all multiprocessors. Two levels of
selection are covered where the fine one reads sketches of keys.

The peer of the launches in `steps`, which take over where `refusal` names a reason or it does not pay. It
computes the same (`reference.spla_token`); the source says how, and what its floor is.
"""

import ctypes
import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ....algorithm.parameters import SplaParameters
from ....algorithm.selectors import Cumulant2Selector, QuestSelector, RemSelector, Taylor2Selector, get_selector
from ...layout import STATE_MAGIC
from ..layer import GpuLayer

SOURCE = Path(__file__).with_name("fused.cu")
SELECTORS = {Taylor2Selector: 1, Cumulant2Selector: 2, RemSelector: 3, QuestSelector: 4}
RESIDUALS = {"none": 0, "regression": 1}
THREADS = 256
WARPS = 8
MAX_CLUSTER = 16
SHARED_LIMIT = 227 << 10  # bytes a thread block may have on Hopper
PAGE_STEP = 64  # bytes, `STEP` of the source
FINE_BLOCK = 16  # tokens, `TILE` of the source
SCORE_WARPS = 4  # of a thread block that scores ahead, each of them another kv head's; as in the source
# Scores are made ahead where that was measured to be faster (`benchmarks/NOTES.md`).
SCORED_FROM = 6144  # the fewest pages that a sequence may have
SCORED_ROWS = 2  # the most rows
SCORED_GROUP = 4  # the most query heads a kv head: more would spill registers
CHOOSING_BYTES = 30 << 20  # keys and values that are read in the time that choosing takes a row by itself
SHARED_ALONE = 115 << 10  # bytes that keep a second thread block from the multiprocessor, while another is idle


class _Params(ctypes.Structure):
    """`Params` of the source."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in (
            "query", "kv", "state", "output", "gain", "query_start_loc", "seq_lens", "block_table", "state_table",
            "table", "count", "candidates", "candidate_count", "scores", "mass",
        )]
        + [(name, ctypes.c_int64) for name in (
            "query_token_stride", "query_head_stride", "page_stride", "head_stride", "state_block_stride",
            "state_head_stride", "output_token_stride", "output_head_stride", "block_table_stride",
            "state_table_stride",
        )]
        + [(name, ctypes.c_int) for name in (
            "num_rows", "num_kv_heads", "last_page", "max_units", "table_width", "budget", "whole", "first",
            "last", "max_candidates", "early",
        )]
        + [("scale", ctypes.c_float), ("residual_scale", ctypes.c_float)]
    )  # fmt: skip


def refusal(
    params: SplaParameters, *, group: int, head_size: int, cache_dtype: torch.dtype, has_sinks: bool = False
) -> str | None:
    """Why the fused launch does not compute this, or None where it does."""
    if has_sinks:
        return "the layer has attention sinks"
    if params.fine_block and params.fine_source != "int4":
        return "the fine level reads keys"
    if params.fine_block not in (0, FINE_BLOCK):
        return f"fine blocks have {params.fine_block} tokens, not {FINE_BLOCK}"
    if params.fine_block and params.selection_block > 128:
        return f"the sketch of {params.selection_block} tokens exceeds a warp's share of shared memory"
    if head_size not in (64, 128):
        return f"head size {head_size} is neither 64 nor 128"
    if group > 8:
        return f"{group} query heads a kv head are more than 8"
    if type(get_selector(params.selector)) not in SELECTORS:
        return f"selector {params.selector!r} is none of {', '.join(selector.name for selector in SELECTORS)}"
    if params.residual not in RESIDUALS:
        return f"residual {params.residual!r} is none of {', '.join(RESIDUALS)}"
    if params.combine != "shared_normalizer":
        return f"combination {params.combine!r} is not shared_normalizer"
    if params.top_p is not None and params.top_p < 1:
        return "top_p is set"
    if cache_dtype not in (torch.float16, torch.bfloat16):
        return f"cache dtype {cache_dtype} is neither float16 nor bfloat16"
    return None


class FusedDecode:
    """The fused launch for one layer shape.

    Args:
        layer: Which layer; `refusal` names nothing.
        max_model_len: The most tokens of a sequence.
        fixed_blocks: Thread blocks a cluster, for every batch; None chooses by the number of rows.
        fixed_score_blocks: Thread blocks that share a row, and up to `SCORE_WARPS` kv heads of it, in the launch that
            scores ahead, for every batch; 0 for no such launch; None chooses by the number of rows.
        choosing_bytes: Few rows are attended to whole up to where reading takes longer than choosing, which takes as
            long as reading so many bytes; 0: no further than `SplaParameters.whole_blocks`.
    """

    def __init__(
        self,
        layer: GpuLayer,
        max_model_len: int,
        *,
        fixed_blocks: int | None = None,
        fixed_score_blocks: int | None = None,
        choosing_bytes: int = CHOOSING_BYTES,
    ) -> None:
        self.layer, self.params, self.num_kv_heads = layer, layer.params, layer.num_kv_heads
        self.fixed_blocks, self.fixed_score_blocks = fixed_blocks, fixed_score_blocks
        self.choosing_bytes = choosing_bytes
        params = layer.params
        self._fp8 = layer.page_layout.fp8_statistics
        self.max_units = -(-max_model_len // params.page_size) * params.blocks_per_page
        self.max_candidates = min(params.candidate_blocks, self.max_units)
        self._per_unit = params.selection_block // params.attended_block
        has_state = params.residual != "none"
        self.defines = {
            "D": layer.head_size,
            "GROUP": layer.group,
            "PAGE": params.page_size,
            "UNIT": params.selection_block,
            "LOG_UNIT": f"{math.log(params.selection_block):.9g}f",
            "FP16": int(layer.cache_dtype == torch.float16),
            "FP8": int(self._fp8),
            "SELECTOR": SELECTORS[type(get_selector(params.selector))],
            "RESIDUAL": RESIDUALS[params.residual],
            "NUM_BLOCKS": layer.state_layout.num_blocks if has_state else 1,
            "BODY": layer.state_layout.rows_per_block - 1,
            "FINE": params.fine_block,
            "SKETCH_AT": 2 * layer.head_size * params.page_size * layer.page_layout.itemsize
            + layer.page_layout.statistics_bytes,
            "SKETCH_SCALES": layer.page_layout.sketch_scales,
            "STAMP_WORD": layer.page_layout.stamp_word,
            "MAGIC": STATE_MAGIC,
        }
        # What depends on the batch alone is worked out once. These caches are its own: those of a class keep it alive.
        for method in ("_choose", "_choose_score_blocks", "shared_bytes", "max_clusters", "_module"):
            setattr(self, method, functools.cache(getattr(self, method)))

    def cluster_size(self, num_rows: int) -> int:
        """Thread blocks a (row, kv head)."""
        return self._choose(num_rows) if self.fixed_blocks is None else self.fixed_blocks

    def score_blocks(self, num_rows: int) -> int:
        """Thread blocks that share a row in the launch that scores ahead; 0 where the clusters score."""
        fixed = self.fixed_score_blocks
        return self._choose_score_blocks(num_rows) if fixed is None else fixed

    def whole_blocks(self, num_rows: int) -> int:
        """Selection blocks of a row up to which all of it is attended to: more than `SplaParameters.whole_blocks` where
        rows are few, because two levels take as long as reading some megabytes does, however few rows there are. One
        level has no candidates, and so nothing more."""
        params = self.params
        block_bytes = 2 * params.selection_block * self.layer.head_size * self.layer.page_layout.itemsize
        extra = int(self.choosing_bytes / (num_rows * self.num_kv_heads * block_bytes))
        few = min(params.budget_blocks * 3 // 2 + extra, params.candidate_blocks * 3 // 2)
        return max(params.whole_blocks, few)

    def _choose_score_blocks(self, num_rows: int) -> int:
        """Worth a launch where clusters leave multiprocessors idle and rows are long (`benchmarks/NOTES.md`)."""
        few_heads = self.layer.group <= SCORED_GROUP and num_rows <= SCORED_ROWS
        if not few_heads or self.params.blocks_per_page > 1 or self.max_units < SCORED_FROM:
            return 0
        # As many as are resident while the clusters of the step before still run, so that all of them ask for their
        # first pages by then: three an idle multiprocessor, one beside a cluster's block; at most two on average.
        busy = num_rows * self.num_kv_heads * self.cluster_size(num_rows)
        at_once = min(2 * self.layer.num_sms, 3 * (self.layer.num_sms - busy) + busy)
        return max(1, at_once // (-(-self.num_kv_heads // SCORE_WARPS) * num_rows))

    def _choose(self, num_rows: int) -> int:
        """As many as let all clusters run at once, a thread block a multiprocessor; 0 where this launch does not pay.

        Clusters of one block are but a way to save launches, and pay where they fill the multiprocessors; with two
        levels, of which there are more launches, always.
        """
        clusters = num_rows * self.num_kv_heads
        for blocks in (16, 8, 4, 2):
            if self.shared_bytes(blocks) <= SHARED_LIMIT and clusters <= self.max_clusters(blocks):
                return blocks
        if self.shared_bytes(1) <= SHARED_LIMIT:
            at_once = self.max_clusters(1)
            if self.params.fine_block or clusters >= 0.9 * at_once * -(-clusters // at_once):
                return 1
        return 0

    def shared_bytes(self, blocks: int) -> int:
        """Shared memory of a thread block; `carve` in the source lays it out."""
        used = self._bytes_without_table(blocks)
        return max(used + self._has_table(blocks) * self._table_bytes, SHARED_ALONE)

    @property
    def _table_bytes(self) -> int:
        """A row's block table."""
        return 4 * self.max_units // self.params.blocks_per_page

    def _has_table(self, blocks: int) -> bool:
        """Whether shared memory has room for it."""
        return self._bytes_without_table(blocks) + self._table_bytes <= SHARED_LIMIT

    def _bytes_without_table(self, blocks: int) -> int:
        group, d = self.layer.group_p, self.layer.head_size
        share = (-(-self.max_units // blocks) + 3) // 4 * 4
        scores = max(share * group, self.max_candidates * self._per_unit * (group + 1))
        has_residual = self.params.residual != "none"
        rows = 4096 // d  # of a warp's ring
        ring = WARPS * rows * max(4 * d + 16, 2 * (2 * d + 16) if self._fp8 else 0)
        queries = 4 if self._fp8 and self.layer.cache_dtype != torch.float16 else 3
        part = blocks * (2 * group + 1 if has_residual else group) * -(-d // 4 // blocks) * 4
        words = share * (1 + group * has_residual) + scores + (part if scores < part else 0)
        words += max(self.params.budget_blocks * self._per_unit, self.max_candidates) + self.max_candidates
        if self.params.fine_block:
            words += -(-group // 4) * 8 * (d + 32) // 4 + group  # q in bytes
        words += queries * 4 * (d + 8) + group * d + blocks * 2 * group + 3 * group
        words += (blocks + WARPS) * 4 * group + (MAX_CLUSTER + 4) * group
        words += (2 * blocks + 1) * 128 + 2 * 64 + WARPS + 4  # selection
        return ring + 4 * words + 26 * 16  # the last: every part begins at 16 bytes

    def pays(self, num_rows: int) -> bool:
        """Whether this launch is for batches of `num_rows`: larger ones wait for memory, not for each other."""
        return self.cluster_size(num_rows) > 0

    def run(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        state_table: torch.Tensor,
        output: torch.Tensor,
        table: torch.Tensor,
        count: torch.Tensor,
        scores: torch.Tensor,
        mass: torch.Tensor,
        candidates: torch.Tensor | None = None,
        candidate_count: torch.Tensor | None = None,
        early: bool = False,
    ) -> None:
        """Attention of one query token a row.

        Args:
            query: `[rows, H, d]`, unscaled, heads dense, in the cache dtype.
            kv_cache: `[num_pages, G, page_size + statistics_rows, 2 d]`, this step's tokens already in it.
            state_cache: State blocks of the same geometry; anything without a residual.
            query_start_loc: `[rows + 1]` int32.
            seq_lens: `[rows]` int32, this step's tokens included; 0 marks padding.
            block_table: `[rows, pages]` int32.
            state_table: `[rows, >= K]` int32.
            output: `[rows, H, d]`; rows of padding become zero.
            table: `[rows, G, width]` int32, written: the ids of the selected blocks, or fine blocks, ascending, the
                current one last.
            count: `[rows, G]` int32, written; more than `width` where few rows are attended to whole.
            scores: `[rows, G, max_units, group]` float32, the group padded to a power of two: scratch of the launch
                that scores ahead.
            mass: As `scores`; the same tensor where masses are the scores (`taylor2`) or there are none (no residual).
            candidates: `[rows, G, max_candidates]` int32, written where selection has two levels and leaves some out:
                as `table`, of selection blocks.
            candidate_count: `[rows, G]` int32, likewise.
            early: The launch before this one writes no statistics but those of pages that the rows' own tokens
                complete, so that the others are read before it has ended.

        Raises:
            ValueError: Pages that begin at no multiple of 64 bytes.
        """
        params, state = self.params, state_cache.view(torch.float32)
        if kv_cache.stride(0) * kv_cache.itemsize % PAGE_STEP:
            raise ValueError(f"a page of {kv_cache.stride(0)} elements is no multiple of {PAGE_STEP} bytes")
        arguments = _Params(
            query=query.data_ptr(),
            kv=kv_cache.data_ptr(),
            state=state.data_ptr(),
            output=output.data_ptr(),
            gain=self.layer.gain.data_ptr(),
            query_start_loc=query_start_loc.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            block_table=block_table.data_ptr(),
            state_table=state_table.data_ptr(),
            table=table.data_ptr(),
            count=count.data_ptr(),
            candidates=None if candidates is None else candidates.data_ptr(),
            candidate_count=None if candidate_count is None else candidate_count.data_ptr(),
            scores=scores.data_ptr(),
            mass=mass.data_ptr(),
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            page_stride=kv_cache.stride(0),
            head_stride=kv_cache.stride(1),
            state_block_stride=state.stride(0),
            state_head_stride=state.stride(1),
            output_token_stride=output.stride(0),
            output_head_stride=output.stride(1),
            block_table_stride=block_table.stride(0),
            state_table_stride=state_table.stride(0),
            num_rows=seq_lens.shape[0],
            num_kv_heads=self.num_kv_heads,
            last_page=kv_cache.shape[0] - 1,
            max_units=self.max_units,
            table_width=table.shape[2],
            budget=params.budget_blocks,
            whole=self.whole_blocks(seq_lens.shape[0]),
            first=params.first_blocks,
            last=params.last_blocks,
            max_candidates=self.max_candidates,
            early=early,
            scale=self.layer.scale,
            residual_scale=params.residual_scale,
        )
        num_rows = seq_lens.shape[0]
        self._launch(arguments, self.cluster_size(num_rows), self.score_blocks(num_rows), num_rows)

    def max_clusters(self, blocks: int) -> int:
        """Clusters of so many thread blocks that run at once."""
        return self._module(blocks, False).max_clusters(blocks, self.shared_bytes(blocks))

    def _module(self, blocks: int, scored: bool) -> "Module":
        return _load(tuple(sorted(self._defines(blocks, scored).items())))

    def _defines(self, blocks: int, scored: bool) -> dict[str, Any]:
        return {**self.defines, "BLOCKS": blocks, "TABLE": int(self._has_table(blocks)), "SCORED": int(scored)}

    def prepare(self, max_num_rows: int) -> None:
        """Compile what batches of up to `max_num_rows` rows need, so that no step has to."""
        for num_rows in range(1, max_num_rows + 1):
            if blocks := self.cluster_size(num_rows):
                self._module(blocks, self.score_blocks(num_rows) > 0)

    def _launch(self, arguments: _Params, blocks: int, score_blocks: int, num_rows: int) -> None:
        module = self._module(blocks, score_blocks > 0)
        if score_blocks:
            module.score(arguments, (score_blocks, -(-self.num_kv_heads // SCORE_WARPS), num_rows))
        module.decode(arguments, (blocks, self.num_kv_heads, num_rows), self.shared_bytes(blocks))


def compile_source(defines: Iterable[tuple[str, Any]], capability: tuple[int, int]) -> bytes:
    """The source as machine code (a cubin), for a GPU that need not be there.

    Args:
        defines: Names and values of macros, see `FusedDecode.defines`.
        capability: Compute capability of the GPU.

    Raises:
        RuntimeError: It does not compile.
    """
    from cuda.bindings import nvrtc

    major, minor = capability
    options = [f"--gpu-architecture=sm_{major}{minor}{'a' if major == 9 else ''}", "--std=c++17"]
    options.append("--generate-line-info")  # for profilers
    options.append("--device-as-default-execution-space")  # for `constexpr` functions
    options += [f"-D{name}={value}" for name, value in defines]
    program = _checked(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], []))
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(error) != 0:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{SOURCE.name} does not compile:\n{log.decode()}")
    cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    return cubin


class Module:
    """The source, compiled for this process's GPU."""

    def __init__(self, defines: tuple[tuple[str, Any], ...]) -> None:
        cubin = compile_source(defines, torch.cuda.get_device_capability())
        torch.cuda.current_stream()  # the context exists
        self._module = _checked(_driver().cuModuleLoadData(cubin))
        self._decode = self._function(b"spla_fused_decode")
        self._score = self._function(b"spla_score_units") if dict(defines)["SCORED"] else None

    def _function(self, name: bytes) -> Any:
        driver = _driver()
        function = _checked(driver.cuModuleGetFunction(self._module, name))
        attributes = driver.CUfunction_attribute
        most_shared = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, most_shared, SHARED_LIMIT))
        any_cluster = attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        _checked(driver.cuFuncSetAttribute(function, any_cluster, 1))
        return function

    @staticmethod
    def _config(grid: tuple[int, int, int], threads: int, shared: int, cluster_size: int) -> Any:
        driver = _driver()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        config.hStream = torch.cuda.current_stream().cuda_stream
        cluster, early = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = cluster_size, 1, 1
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [cluster, early], 2
        return config

    def max_clusters(self, blocks: int, shared: int) -> int:
        """Clusters of so many thread blocks that run at once."""
        config = self._config((blocks, 1, 1), THREADS, shared, blocks)
        return _checked(_driver().cuOccupancyMaxActiveClusters(self._decode, config))

    def decode(self, arguments: _Params, grid: tuple[int, int, int], shared: int) -> None:
        """Launch `spla_fused_decode`, a cluster a (row, kv head)."""
        self._launch(self._decode, arguments, self._config(grid, THREADS, shared, grid[0]))

    def score(self, arguments: _Params, grid: tuple[int, int, int]) -> None:
        """Launch `spla_score_units`."""
        self._launch(self._score, arguments, self._config(grid, 32 * SCORE_WARPS, 0, 1))

    @staticmethod
    def _launch(function: Any, arguments: _Params, config: Any) -> None:
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _checked(_driver().cuLaunchKernelEx(config, function, ctypes.addressof(pointer), 0))


_load = functools.cache(Module)


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(result: tuple) -> Any:
    error, *values = result
    if int(error) != 0:
        driver = _driver()
        name = driver.cuGetErrorName(error)[1] if isinstance(error, driver.CUresult) else error
        raise RuntimeError(f"{SOURCE.name}: {name}")
    return values[0] if values else None
