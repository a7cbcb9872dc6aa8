"""SPLA decode over the engine's paged cache on a GPU: the launches of one layer and one step.

`TritonPagedSpla` is the peer of `TorchPagedSpla` for uniform batches of one to `1 + k` query tokens a row (plain decode
and speculative verification). The plain reference of the whole is `reference.spla_token`.

Where it covers the parameters and pays, `fused` makes a step in one launch or two. Otherwise its launches are,
each dependent on the one before:

1. `prepare_kernel`: fold the recurrent state (`gpu/state`), score all selection blocks (`score`), and, in the
   last split of a (row, kv head) to arrive, select (`select`). For many query tokens a row or very long
   contexts selection is a launch of its own.
2. `attend_kernel`: selected blocks, residual, merge, combination (`attend`).

Grids depend on shapes only; lengths, validity of states, and which rows are dense are decided on the device. Nothing
allocates or synchronises, so that a step can be captured in a CUDA graph.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from tqdm import tqdm

from ....algorithm.parameters import SplaParameters
from ....algorithm.statistics_format import MAX_COUNT, STATISTICS_DTYPES
from ...layout import STATE_MAGIC, layouts
from ..launch import Launch, current_stream, layer_of
from ..page import SELECTOR_CODES, update_cache_kernel
from ..state import fold_slice
from .attend import RESIDUAL_CODES, attend_kernel
from .flashinfer import FlashInferDecode, check_flashinfer
from .fused import FusedDecode, refusal
from .score import score_units
from .select import select_units

_FEW_TOKENS = 128  # of a step; up to here a program stores one
_TOKENS = 32  # that it stores in larger steps
_SELECT_ELEMENTS = 32768  # scores that selection keeps in registers; more are gone through in pieces


# What differs from step to step, and between an engine and the warm-up, must not ask for another compilation.
@triton.jit(do_not_specialize=["block_table_stride", "state_table_stride", "last_page"])
def prepare_kernel(
    query_ptr,
    kv_ptr,
    kv_int_ptr,
    state_ptr,
    state_int_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_table_ptr,
    state_table_ptr,
    scores_ptr,
    mass_ptr,
    lse_ptr,
    grouped_ptr,
    table_ptr,
    count_ptr,
    flags_ptr,
    fold_arrivals_ptr,
    score_arrivals_ptr,
    read_ptr,
    read_z_ptr,
    read_v_ptr,
    query_token_stride,
    query_head_stride,
    page_stride,
    head_stride,
    int_page_stride,
    int_head_stride,
    block_stride,
    block_head_stride,
    block_table_stride,
    state_table_stride,
    last_page,
    max_units,
    num_kv_heads,
    scale,
    MAGIC: tl.constexpr,
    STAMP_WORD: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BODY: tl.constexpr,
    PARTS: tl.constexpr,
    SLICE: tl.constexpr,
    FOLD_TILE: tl.constexpr,
    LINEAR: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    STRIDE: tl.constexpr,
    FP8: tl.constexpr,
    LOG_UNIT: tl.constexpr,
    BUDGET: tl.constexpr,
    BUDGET_P: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    SELECTOR: tl.constexpr,
    WRITE_MASS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_P: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_P: tl.constexpr,
    SELECT: tl.constexpr,
    TRIGGER: tl.constexpr,  # a dependent launch follows
):
    """Grid (PARTS + SPLITS, G, rows): the first PARTS programs fold, the others score."""
    part = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    if TRIGGER:
        tl.extra.cuda.gdc_launch_dependents()
    if part < PARTS:
        fold_slice(
            row, head, part, query_ptr, kv_ptr, kv_int_ptr, state_ptr, state_int_ptr, query_start_loc_ptr, seq_lens_ptr,
            block_table_ptr, state_table_ptr, fold_arrivals_ptr, read_ptr, read_z_ptr, read_v_ptr,
            query_token_stride, query_head_stride, num_kv_heads, page_stride, head_stride,
            int_page_stride, int_head_stride, block_stride, block_head_stride, block_table_stride, state_table_stride,
            scale, MAGIC, STAMP_WORD, NUM_BLOCKS, BODY, PARTS, SLICE, GROUP, GROUP_P, QUERY_LEN, M, D, DP, PAGE, UNIT,
            BUDGET, FOLD_TILE, LINEAR,
        )  # fmt: skip
    else:
        score_units(
            row, head, part - PARTS, SPLITS, query_ptr, kv_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr,
            scores_ptr, mass_ptr, lse_ptr, query_token_stride, query_head_stride, page_stride, head_stride,
            block_table_stride, last_page, max_units, num_kv_heads, scale,
            GROUP, GROUP_P, N, D, DP, PAGE, UNIT, STRIDE, FP8, LOG_UNIT, BUDGET, CHUNK, STAGES, SELECTOR,
            WRITE_MASS,
        )  # fmt: skip
        if SELECT:
            tl.debug_barrier()  # every thread's scores are written before the arrival is announced
            arrivals = score_arrivals_ptr + row * num_kv_heads + head
            if tl.atomic_add(arrivals, 1, sem="acq_rel") == SPLITS - 1:
                tl.store(arrivals, 0)
                for token_in_row in tl.range(QUERY_LEN):
                    select_units(
                        row, token_in_row, head, query_start_loc_ptr, seq_lens_ptr, block_table_ptr, scores_ptr,
                        lse_ptr, grouped_ptr, table_ptr, count_ptr, flags_ptr, block_table_stride, max_units,
                        num_kv_heads, SPLITS,
                        GROUP, GROUP_P, PAGE, UNIT, BUDGET, BUDGET_P, FIRST, LAST, UNITS, WIDTH, SPLITS_P, TOP_P,
                        False,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["block_table_stride"])
def select_kernel(
    query_start_loc_ptr,
    seq_lens_ptr,
    block_table_ptr,
    scores_ptr,
    lse_ptr,
    grouped_ptr,
    table_ptr,
    count_ptr,
    flags_ptr,
    block_table_stride,
    max_units,
    num_kv_heads,
    num_splits,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    BUDGET: tl.constexpr,
    BUDGET_P: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS_P: tl.constexpr,
    TOP_P: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (G, rows * QUERY_LEN)."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1) // QUERY_LEN
    token_in_row = tl.program_id(1) % QUERY_LEN
    select_units(
        row, token_in_row, tl.program_id(0), query_start_loc_ptr, seq_lens_ptr, block_table_ptr, scores_ptr, lse_ptr,
        grouped_ptr, table_ptr, count_ptr, flags_ptr, block_table_stride, max_units, num_kv_heads,
        num_splits, GROUP, GROUP_P, PAGE, UNIT, BUDGET, BUDGET_P, FIRST, LAST, UNITS, WIDTH, SPLITS_P, TOP_P,
        DEPENDENT,
    )  # fmt: skip


@dataclass(frozen=True)
class Tuning:
    """Launch shapes of one batch size; every field is a function of shapes, never of lengths."""

    score_splits: int
    attend_splits: int
    chunk: int = 64  # selection blocks a scoring step
    score_stages: int = 3
    score_warps: int = 4
    tile: int = 64  # tokens an attention step
    attend_stages: int = 3
    attend_warps: int = 4
    mass_parts: int = 1  # programs that sum the mass of the blocks left out
    select_warps: int = 8
    score_registers: int | None = 168  # cap, for more programs on a multiprocessor
    fuse_select: bool = False


def _power(x: float) -> int:
    """The nearest power of two, at least 1."""
    return 1 << max(0, round(math.log2(max(x, 1.0))))


class _Scratch:
    """Buffers between the launches of a step, shared by all layers of one geometry: layers run one after another."""

    _instances: ClassVar[dict[tuple, "_Scratch"]] = {}

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        for name, (shape, dtype) in shapes.items():
            # Arrival counters start at zero and every launch leaves them so; nothing else is read before it is written.
            setattr(self, name, torch.zeros(shape, dtype=dtype, device=device))
        self.nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
        self.flashinfer: dict[tuple, FlashInferDecode] = {}  # by what shapes do not tell

    scores: torch.Tensor  # [tokens, G, max_units, GROUP_P] float32
    mass: torch.Tensor  # as scores, or 1 element
    lse: torch.Tensor  # [tokens, G, splits, GROUP_P] float32
    grouped: torch.Tensor  # [tokens, G, max_units] float32, or 1 element
    table: torch.Tensor  # [tokens, G, largest budget] int32; layers with smaller ones take the beginning
    count: torch.Tensor  # [tokens, G] int32
    flags: torch.Tensor  # [tokens, G, max_units] int8
    part_out: torch.Tensor  # [parts, N, DP] float32
    part_sum: torch.Tensor  # [parts, 2, N] float32
    rest_mass: torch.Tensor  # [tokens, G, MASS_PARTS, GROUP_P] float32
    read: torch.Tensor  # [tokens, G, PARTS, GROUP_P, DP] float32
    read_z: torch.Tensor  # [tokens, G, PARTS, GROUP_P] float32
    read_v: torch.Tensor  # [tokens, G, DP] float32
    fold_arrivals: torch.Tensor  # [rows, G] int32
    score_arrivals: torch.Tensor  # [rows, G] int32
    attend_arrivals: torch.Tensor  # [tokens, G] int32

    @classmethod
    def shared(cls, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> "_Scratch":
        key = (str(device), *sorted(shapes.items()))
        if key not in cls._instances:
            cls._instances[key] = cls(shapes, device)
        return cls._instances[key]


class TritonPagedSpla:
    """Run SPLA decode of one layer over the engine's paged cache.

    Args:
        params: What to compute.
        num_heads: Query heads `H`.
        num_kv_heads: Kv heads `G`.
        head_size: `d`.
        cache_dtype: Dtype of the cache, fp16 or bf16; states are stored in float32.
        scale: Softmax scale; queries arrive unscaled.
        gain: Per-head weight of the tail, `[H]`; 1 where None.
        norm_weights: `(exact [H, d], tail [H, d])` of the double RMSNorm; 1 where None.
        max_num_rows: The most rows of a batch.
        max_query_len: The most query tokens of a row.
        max_model_len: The most tokens of a sequence.
        device: Where the cache lives.
        tuning: Launch shapes for every batch, instead of those that `tuning` chooses; these launches then take every
            batch, and `fused` none.
        executor: What attends to the selected pages: our own kernel (`spla`) or `flashinfer`.
        largest_budget: Selection blocks that scratch is allocated for: the largest budget of the layers that are to
            share it; None for this layer's.

    Attributes:
        page_layout: Bytes of a page.
        state_layout: Bytes of a state block.
        page_table: `[tokens, G, budget]` int32, ids `(page * G + head) * blocks_per_page + block` of the last `decode`,
            ascending, the current selection block last (`page_table.py`).
        page_counts: `[tokens, G]` int32, blocks of each list.

    Raises:
        ValueError: Parameters that these kernels do not cover.
    """

    _warm: ClassVar[set[tuple]] = set()
    _store_launches: ClassVar[dict[tuple, Launch]] = {}
    _store_geometries: ClassVar[dict[tuple, int]] = {}

    def __init__(
        self,
        params: SplaParameters,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype: torch.dtype,
        scale: float,
        gain: torch.Tensor | None = None,
        norm_weights: tuple[torch.Tensor, torch.Tensor] | None = None,
        max_num_rows: int,
        max_query_len: int = 1,
        max_model_len: int,
        device: torch.device | str,
        tuning: Tuning | None = None,
        executor: str = "spla",
        largest_budget: int | None = None,
    ) -> None:
        _check(params, num_heads, num_kv_heads, head_size, cache_dtype, max_query_len, max_model_len, executor)
        device = torch.device(device)
        self._tuning = tuning
        self.params, self.scale, self.device = params, float(scale), device
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.group = num_heads // num_kv_heads
        self.max_num_rows, self.max_query_len = max_num_rows, max_query_len
        self.cache_dtype = cache_dtype
        self.top_p = params.top_p if params.top_p is not None and params.top_p < 1 else 0.0  # 0 where there is none
        self.page_layout, self.state_layout = layouts(params, head_size, cache_dtype)
        self.max_pages = -(-max_model_len // params.page_size)
        self.max_units = self.max_pages * params.blocks_per_page
        self.has_mass = params.residual != "none" and params.combine == "shared_normalizer"
        self.write_mass = self.has_mass and params.selector not in ("mean", "taylor2")
        self.gain = torch.ones(num_heads) if gain is None else gain
        self.gain = self.gain.to(device=device, dtype=torch.float32).contiguous()
        weights = (torch.ones(num_heads, head_size),) * 2 if norm_weights is None else norm_weights
        self.norm_weights = tuple(w.to(device=device, dtype=torch.float32).contiguous() for w in weights)
        self._salt = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int64).to(device=device, dtype=torch.int32)
        self._counter = torch.zeros(1, dtype=torch.int32, device=device)
        # Layers of one geometry store by the same launch.
        stored = (device, self.page_layout, params.selector, num_kv_heads, cache_dtype)
        self._store_geometry = self._store_geometries.setdefault(stored, len(self._store_geometries))
        self._dependent = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
        self._launch_early = {"launch_pdl": True} if self._dependent else {}
        self._num_sms = 132
        if device.type == "cuda":
            self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count

        # Shapes the kernels are specialised for.
        self._dp = triton.next_power_of_2(head_size)
        self._group_p = triton.next_power_of_2(self.group)
        # Heads of a group, padded so that the matrix products have the 16 columns that `wgmma` is chosen for.
        self._columns = max(16 if params.residual == "none" else 4, self._group_p)
        self._attend_n = self._columns if params.residual == "none" else 4 * self._columns
        self._slice = min(32, self._dp)
        self._parts = -(-head_size // self._slice) if params.residual != "none" else 0
        self._fold_tile = min(64, params.page_size & -params.page_size)
        self._units_p = triton.next_power_of_2(self.max_units)
        self._width = min(self._units_p, max(16, _SELECT_ELEMENTS // self._group_p))
        budget = params.budget_blocks
        self.largest_budget = max(largest_budget or 0, budget)
        self._scratch = _Scratch.shared(self._scratch_shapes(), device)
        table = self._scratch.table
        self.page_table = table.view(-1)[: table[..., :budget].numel()].view(*table.shape[:2], budget)
        self.page_counts = self._scratch.count
        self._flashinfer: FlashInferDecode | None = None
        if executor == "flashinfer":
            geometry = (params.page_size, head_size, self.group, cache_dtype, self.scale, budget)
            if geometry not in self._scratch.flashinfer:
                self._scratch.flashinfer[geometry] = FlashInferDecode(self)
            self._flashinfer = self._scratch.flashinfer[geometry]
        self.fused: FusedDecode | None = None
        refused = refusal(params, group=self.group, head_size=head_size, cache_dtype=cache_dtype)
        if executor == "spla" and self._dependent and tuning is None and refused is None:
            self.fused = FusedDecode(
                params,
                num_kv_heads=num_kv_heads,
                scale=self.scale,
                page_layout=self.page_layout,
                state_layout=self.state_layout,
                max_model_len=max_model_len,
                num_sms=self._num_sms,
                group=self.group,
                head_size=head_size,
                cache_dtype=cache_dtype,
            )
            self.fused.prepare(max_num_rows)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the scratch, which all layers of one geometry share."""
        return self._scratch.nbytes + (self._flashinfer.nbytes if self._flashinfer else 0)

    def _scratch_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, group, kv_heads, units = self.max_num_rows, self._group_p, self.num_kv_heads, self.max_units
        tokens = rows * self.max_query_len
        budget = self.largest_budget
        sizes = itertools.product(range(1, rows + 1), range(1, self.max_query_len + 1))
        tunings = [(n, q, self.tuning(n, q, budget)) for n, q in sizes]
        parts = max(n * q * kv_heads * tuning.attend_splits for n, q, tuning in tunings)
        lse = max(n * q * tuning.score_splits for n, q, tuning in tunings)
        mass = max(n * q * tuning.mass_parts for n, q, tuning in tunings)
        return {
            "scores": ((tokens, kv_heads, units, group), torch.float32),
            "mass": ((tokens, kv_heads, units, group) if self.write_mass else (1,), torch.float32),
            "lse": ((lse, kv_heads, group), torch.float32),
            "grouped": ((tokens, kv_heads, units) if self._width < self._units_p else (1,), torch.float32),
            "table": ((tokens, kv_heads, budget), torch.int32),
            "count": ((tokens, kv_heads), torch.int32),
            "flags": ((tokens, kv_heads, units), torch.int8),
            "part_out": ((parts, self._attend_n, self._dp), torch.float32),
            "part_sum": ((parts, 2, self._attend_n), torch.float32),
            "rest_mass": ((mass, kv_heads, group), torch.float32),
            "read": ((tokens, kv_heads, max(1, self._parts), group, self._dp), torch.float32),
            "read_z": ((tokens, kv_heads, max(1, self._parts), group), torch.float32),
            "read_v": ((tokens, kv_heads, self._dp), torch.float32),
            "fold_arrivals": ((rows, kv_heads), torch.int32),
            "score_arrivals": ((rows, kv_heads), torch.int32),
            "attend_arrivals": ((tokens, kv_heads), torch.int32),
        }

    def tuning(self, num_rows: int, query_len: int, budget: int | None = None) -> Tuning:
        """Launch shapes for `num_rows` rows of up to `query_len` query tokens, of `budget` selection blocks instead of
        this layer's."""
        if self._tuning is not None:
            return self._tuning
        chunk = 64 if self._dp <= 128 else 32
        if self.params.selector == "km2-rem":  # twice the statistics
            chunk //= 2
        tile = 64 if self._dp <= 128 else 32
        units = num_rows * self.num_kv_heads
        score_splits = max(1, min(-(-self.max_units // chunk), _power(512 / units), 32))
        # Where statistics are bytes a long row takes twice as many a step; with more columns registers would spill.
        few_columns = self._group_p * query_len <= 8
        wide = self.page_layout.fp8_statistics and few_columns and self.max_units >= 32 * chunk * score_splits
        if wide:
            chunk *= 2
        # More splits than tiles would be idle; past 16, merging costs more than reading gains.
        tiles = -(-(budget or self.params.budget_blocks) * self.params.selection_block // tile)
        units *= query_len
        attend_splits = min(tiles, 16, max(_power(128 / units), 2 if units <= 256 else 1))
        return Tuning(
            score_splits,
            attend_splits,
            chunk=chunk,
            tile=tile,
            mass_parts=min(8, _power(64 / units)),
            select_warps=min(32, max(4, min(self._units_p * self._group_p, _SELECT_ELEMENTS) // 1024)),
            score_registers=None if wide else Tuning.score_registers,
        )

    # Writing ----------------------------------------------------------------------------------------------------

    def update_cache(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Store keys and values; make statistics and stamp of every page whose last slot is written.

        Args:
            key: `[tokens, kv_heads, head_size]`, heads dense.
            value: As `key`.
            kv_cache: `[num_pages, kv_heads, page_size + statistics_rows, 2 * head_size]`, rows dense.
            slot_mapping: `[tokens]` int64, `page * page_size + offset`, -1 for padding. Tokens of one sequence stand
                side by side in ascending order.
        """
        num_tokens = slot_mapping.shape[0]
        if num_tokens == 0:
            return
        own = {"key": key, "value": value, "slots": slot_mapping, "kv": kv_cache, "salt": self._salt,
               "counter": self._counter}  # fmt: skip
        addresses, alike = layer_of(own)
        layer = (self._store_geometry, *alike)
        launch = self._store_launches.get((num_tokens, layer))
        if launch is None:
            if len(self._store_launches) >= 64:  # steps of prompts have any number of tokens
                self._store_launches.clear()
            launch = self._store_launch(num_tokens, own, layer)
            self._store_launches[num_tokens, layer] = launch
        addresses["kv_int"] = addresses["kv"]
        launch(addresses, lambda: own | {"kv_int": kv_cache.view(torch.int32)}, current_stream(self.device))

    def _store_launch(self, num_tokens: int, own: dict[str, torch.Tensor], layer: tuple) -> Launch:
        """Storing so many tokens, for all layers of which `layer` is true."""
        key, value, kv_cache, block = own["key"], own["value"], own["kv"], self.params.selection_block
        kv_int = kv_cache.view(torch.int32)
        # Two clusters are made of a selection block at once, everything else of a power of two at a time.
        clusters = self.params.selector == "km2-rem"
        tile = triton.next_power_of_2(block) if clusters else min(64, block & -block)
        tokens = 1 if num_tokens <= _FEW_TOKENS else _TOKENS  # a program
        return Launch(
            update_cache_kernel,
            (triton.cdiv(num_tokens, tokens), self.num_kv_heads),
            (
                "key", "value", "slots", "kv", "kv_int", "salt", "counter", num_tokens, key.stride(0), key.stride(1),
                value.stride(0), value.stride(1), kv_cache.stride(0), kv_cache.stride(1), kv_int.stride(0),
                kv_int.stride(1),
            ),
            {
                "D": self.head_size, "DP": self._dp, "PAGE": self.params.page_size, "UNIT": block,
                "STRIDE": self.page_layout.statistics_stride, "FP8": self.page_layout.fp8_statistics,
                "TOKENS": tokens, "TILE": tile, "STAMP_WORD": self._stamp_word,
                "LIMIT": torch.finfo(self.cache_dtype).max, "SELECTOR": SELECTOR_CODES[self.params.selector],
                "DEPENDENT": self._dependent, **self._launch_early,
                "num_warps": 8 if tile * self._dp > 8192 else 4 if tile * self._dp >= 4096 else 2,
            },
            layer,
        )  # fmt: skip

    def warm_up(self) -> None:
        """Compile what steps of any number of tokens and of decode rows need, so that no request has to wait for it.

        What the `flashinfer` executor needs is left to the captured graphs.
        """
        key = (self.device, self.params, self.cache_dtype, self.num_heads, self.num_kv_heads, self.head_size,
               self.max_num_rows, self.max_query_len, self.max_units)  # fmt: skip
        if self.device.type != "cuda" or key in self._warm:
            return
        self._warm.add(key)
        self._store_padding()
        if self._flashinfer is None:
            steps = self._different_steps()
            for num_rows, query_len in tqdm(steps, desc="Compiling SPLA decode kernels", disable=len(steps) < 2):
                self._decode_padding(num_rows, query_len)
        torch.cuda.synchronize(self.device)

    def _different_steps(self) -> list[tuple[int, int]]:
        """A number of rows and of query tokens a row for each launch shape that decode outside of `fused` can take."""
        found: dict[tuple[Tuning, int], int] = {}
        for query_len, num_rows in itertools.product({1, self.max_query_len}, range(1, self.max_num_rows + 1)):
            if not (self.fused and query_len == 1 and self.fused.pays(num_rows)):
                found.setdefault((self.tuning(num_rows, query_len), query_len), num_rows)
        return [(num_rows, query_len) for (_, query_len), num_rows in found.items()]

    def _decode_padding(self, num_rows: int, query_len: int) -> None:
        """A decode step of rows that are all padding."""
        pages = 1 + self.state_layout.num_blocks
        cache_shape = (pages, self.num_kv_heads, self.page_layout.rows, 2 * self.head_size)
        cache = torch.zeros(cache_shape, dtype=self.cache_dtype, device=self.device)
        query_shape = (num_rows * query_len, self.num_heads, self.head_size)
        query = torch.zeros(query_shape, dtype=self.cache_dtype, device=self.device)
        starts = torch.zeros(num_rows + 1, dtype=torch.int32, device=self.device)
        lens = torch.zeros(num_rows, dtype=torch.int32, device=self.device)
        block_table = torch.zeros(num_rows, self.max_pages, dtype=torch.int32, device=self.device)
        state_table = torch.zeros(num_rows, pages, dtype=torch.int32, device=self.device)
        output = torch.empty_like(query)
        self.decode(query, cache, cache, starts, lens, block_table, state_table, output, query_len)

    def _store_padding(self) -> None:
        """Store no tokens, as steps of few tokens do and as steps of many."""
        shape = (1, self.num_kv_heads, self.page_layout.rows, 2 * self.head_size)
        kv_cache = torch.zeros(shape, dtype=self.cache_dtype, device=self.device)
        for num_tokens in (1, _FEW_TOKENS + 1):
            tokens = torch.zeros(
                num_tokens, self.num_kv_heads, self.head_size, dtype=self.cache_dtype, device=self.device
            )
            padding = torch.full((num_tokens,), -1, dtype=torch.int64, device=self.device)
            self.update_cache(tokens, tokens, kv_cache, padding)

    @property
    def _stamp_word(self) -> int:
        layout = self.page_layout
        elements = layout.page_size * 2 * layout.head_size + layout.stamp_offset
        return elements * layout.itemsize // 4

    # Attention --------------------------------------------------------------------------------------------------

    def decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
        max_query_len: int,
        steady: bool = False,
    ) -> None:
        """Attention of one layer for a batch of decode rows.

        Args:
            query: `[rows * max_query_len, H, d]`, unscaled, heads dense.
            kv_cache: `[num_pages, G, page_size + statistics_rows, 2 d]`, this step's tokens already in it.
            state_cache: State blocks of the same geometry; may be None without a residual.
            query_start_loc: `[rows + 1]` int32.
            seq_lens: `[rows]` int32, this step's tokens included; 0 marks padding.
            block_table: `[rows, pages]` int32.
            state_table: `[rows, >= K]` int32; may be None without a residual.
            output: `[rows * max_query_len, H, d]`; rows of padding become zero.
            max_query_len: Query tokens of a row.
            steady: The step has no tokens but these rows', so that all pages but those that they complete now have had
                their statistics before it began: these may be read while the launch ahead of this one still runs.
        """
        num_rows = seq_lens.shape[0]
        if num_rows == 0:
            return
        if not (num_rows <= self.max_num_rows and 1 <= max_query_len <= self.max_query_len):
            raise ValueError(
                f"{num_rows} rows of {max_query_len} tokens exceed {self.max_num_rows} of {self.max_query_len}"
            )
        if state_cache is None or state_table is None:
            if self._parts:
                raise ValueError(f"residual {self.params.residual!r} needs a state cache and its table")
            state_cache, state_table = kv_cache, block_table
        params, scratch = self.params, self._scratch
        if self.fused and max_query_len == 1 and query.dtype == self.cache_dtype and self.fused.pays(num_rows):
            self.fused.run(
                query, kv_cache, state_cache, query_start_loc, seq_lens, block_table, state_table, self.gain, output,
                self.page_table, scratch.count, scratch.scores, scratch.mass if self.write_mass else scratch.scores,
                early=steady,
            )  # fmt: skip
            return
        tuning = self.tuning(num_rows, max_query_len)
        kv_int = kv_cache.view(torch.int32)
        state, state_int = state_cache.view(torch.float32), state_cache.view(torch.int32)
        mass = scratch.mass if self.write_mass else scratch.scores
        kv_heads, tokens = self.num_kv_heads, num_rows * max_query_len
        splits_p = triton.next_power_of_2(tuning.score_splits)
        columns = triton.next_power_of_2(self._group_p * max_query_len)
        budget = params.budget_blocks
        body = self.state_layout.rows_per_block - 1
        shared = {
            "GROUP": self.group,
            "GROUP_P": self._group_p,
            "QUERY_LEN": max_query_len,
            "PAGE": params.page_size,
            "UNIT": params.selection_block,
            "BUDGET": budget,
        }
        selection = {
            "BUDGET_P": triton.next_power_of_2(budget),
            "FIRST": params.first_blocks,
            "LAST": params.last_blocks,
            "UNITS": self._units_p,
            "SPLITS_P": splits_p,
            "TOP_P": self.top_p,
        }
        prepare_kernel[(self._parts + tuning.score_splits, kv_heads, num_rows)](
            query,
            kv_cache,
            kv_int,
            state,
            state_int,
            query_start_loc,
            seq_lens,
            block_table,
            state_table,
            scratch.scores,
            scratch.mass,
            scratch.lse,
            scratch.grouped,
            self.page_table,
            scratch.count,
            scratch.flags,
            scratch.fold_arrivals,
            scratch.score_arrivals,
            scratch.read,
            scratch.read_z,
            scratch.read_v,
            query.stride(0),
            query.stride(1),
            kv_cache.stride(0),
            kv_cache.stride(1),
            kv_int.stride(0),
            kv_int.stride(1),
            state.stride(0),
            state.stride(1),
            block_table.stride(0),
            state_table.stride(0),
            kv_cache.shape[0] - 1,
            self.max_units,
            kv_heads,
            self.scale,
            MAGIC=STATE_MAGIC,
            STAMP_WORD=self._stamp_word,
            NUM_BLOCKS=self.state_layout.num_blocks,
            BODY=body,
            PARTS=self._parts,
            SLICE=self._slice,
            FOLD_TILE=self._fold_tile,
            LINEAR=params.residual == "linear",
            M=max(16, columns),
            N=max(8, columns),
            D=self.head_size,
            DP=self._dp,
            STRIDE=self.page_layout.statistics_stride,
            FP8=self.page_layout.fp8_statistics,
            LOG_UNIT=math.log(params.selection_block),
            CHUNK=tuning.chunk,
            STAGES=tuning.score_stages,
            SELECTOR=SELECTOR_CODES[params.selector],
            WRITE_MASS=self.write_mass,
            SPLITS=tuning.score_splits,
            WIDTH=self._width,
            SELECT=tuning.fuse_select,
            TRIGGER=self._dependent,
            num_warps=tuning.score_warps,
            **({} if tuning.score_registers is None else {"maxnreg": tuning.score_registers}),
            **shared,
            **selection,
        )
        if not tuning.fuse_select:
            select_kernel[(kv_heads, tokens)](
                query_start_loc,
                seq_lens,
                block_table,
                scratch.scores,
                scratch.lse,
                scratch.grouped,
                self.page_table,
                scratch.count,
                scratch.flags,
                block_table.stride(0),
                self.max_units,
                kv_heads,
                tuning.score_splits,
                WIDTH=self._width,
                DEPENDENT=self._dependent,
                num_warps=tuning.select_warps,
                **shared,
                **selection,
                **self._launch_early,
            )
        if self._flashinfer is not None:
            self._flashinfer.attend(
                self, tuning, query, kv_cache, query_start_loc, seq_lens, output, max_query_len
            )  # fmt: skip
            return
        attend_kernel[(tuning.attend_splits + self.mass_parts(tuning), kv_heads, tokens)](
            query,
            kv_cache,
            query_start_loc,
            seq_lens,
            self.page_table,
            scratch.count,
            scratch.flags,
            mass,
            scratch.part_out,
            scratch.part_sum,
            scratch.rest_mass,
            scratch.read,
            scratch.read_z,
            scratch.read_v,
            scratch.attend_arrivals,
            self.gain,
            self.norm_weights[0],
            self.norm_weights[1],
            output,
            num_rows,
            query.stride(0),
            query.stride(1),
            output.stride(0),
            output.stride(1),
            kv_cache.stride(0),
            kv_cache.stride(1),
            kv_cache.shape[0] - 1,
            self.max_units,
            kv_heads,
            self.scale,
            params.residual_scale,
            params.rms_norm_eps,
            D=self.head_size,
            DP=self._dp,
            SPLITS=tuning.attend_splits,
            DEPENDENT=self._dependent,
            **self.attend_constants(tuning),
            **shared,
            **self._launch_early,
        )

    def mass_parts(self, tuning: Tuning) -> int:
        """Programs a (token, kv head) that add up the mass of what is not selected."""
        return tuning.mass_parts if self.has_mass else 0

    def attend_constants(self, tuning: Tuning) -> dict[str, Any]:
        """What the launches that attend and combine have in common, whichever executor's they are."""
        return {
            "C": self._columns,
            "N": self._attend_n,
            "TILE": tuning.tile,
            "STAGES": tuning.attend_stages,
            "PARTS": self._parts,
            "RESIDUAL": RESIDUAL_CODES[self.params.residual],
            "HAS_MASS": self.has_mass,
            "MASS_PARTS": self.mass_parts(tuning),
            "MASS_WIDTH": max(64, 1024 // self._group_p),
            "DOUBLE_NORM": self.params.combine == "double_rmsnorm",
            "num_warps": tuning.attend_warps,
        }


def _check(
    params: SplaParameters,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    cache_dtype: torch.dtype,
    query_len: int,
    max_model_len: int,
    executor: str,
) -> None:
    """One place for every case that these kernels refuse."""
    if params.page_size % 16 != 0:
        raise ValueError(f"page_size {params.page_size} is no multiple of 16")
    if params.selection_block % 16 != 0 or params.page_size % params.selection_block != 0:
        raise ValueError(
            f"selection_block {params.selection_block} is no multiple of 16 that divides page_size {params.page_size}"
        )
    if params.fine_block:
        raise ValueError(
            f"fine_block_size {params.fine_block}: selection in two levels has no kernel, set fine_block_size to 0"
        )
    if params.statistics_dtype not in STATISTICS_DTYPES:
        raise ValueError(
            f"statistics_dtype {params.statistics_dtype!r} has no kernel, choose one of {', '.join(STATISTICS_DTYPES)}"
        )
    if params.statistics_dtype == "fp8" and params.selector == "km2-rem" and params.selection_block > MAX_COUNT:
        raise ValueError(
            f"selection_block {params.selection_block}: statistics_dtype 'fp8' counts up to {MAX_COUNT} keys "
            "of a cluster"
        )
    if params.selector not in SELECTOR_CODES:
        raise ValueError(f"selector {params.selector!r} has no kernel, choose one of {', '.join(SELECTOR_CODES)}")
    if params.residual not in RESIDUAL_CODES:
        raise ValueError(f"residual {params.residual!r} has no kernel, choose one of {', '.join(RESIDUAL_CODES)}")
    if params.residual == "linear" and params.feature_map != "softmax":
        raise ValueError(f"feature_map {params.feature_map!r} has no kernel, choose softmax")
    if params.combine not in ("shared_normalizer", "double_rmsnorm"):
        raise ValueError(f"combine {params.combine!r} has no kernel")
    if params.selector == "quest" and params.residual != "none" and params.combine == "shared_normalizer":
        raise ValueError("selector 'quest' gives no tail mass: use residual 'none'")
    if params.budget_blocks < params.max_forced_blocks:
        raise ValueError(f"budget_blocks {params.budget_blocks} is below {params.max_forced_blocks} forced blocks")
    if num_heads % num_kv_heads != 0:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} kv heads")
    if head_size % 16 != 0 or head_size > 256:
        raise ValueError(f"head_size {head_size} is no multiple of 16 up to 256")
    if cache_dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"cache_dtype {cache_dtype} is neither float16 nor bfloat16")
    if query_len > params.page_size:
        raise ValueError(f"{query_len} query tokens a row exceed a page of {params.page_size}")
    if -(-max_model_len // params.page_size) * params.blocks_per_page >= 1 << 16:  # selection counts in 16 bits
        raise ValueError(
            f"max_model_len {max_model_len} is more than 65535 selection blocks of {params.selection_block} tokens"
        )
    if executor == "flashinfer":
        if params.selection_block != params.page_size:
            raise ValueError(
                f"executor 'flashinfer' reads whole pages: set selection_block_size to {params.page_size} or executor "
                "to 'spla'"
            )
        check_flashinfer(head_size)
    elif executor != "spla":
        raise ValueError(f"executor {executor!r} is neither spla nor flashinfer")
