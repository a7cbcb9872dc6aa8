"""SPLA decode over the engine's paged cache on a GPU: the launches of one layer and one step.

`DecodeSteps` takes rows of one to `1 + k` query tokens, of unequal numbers too (plain decode, drafts to verify).
The plain reference of the whole is `reference.spla_token`.

Where it covers the parameters and pays, `fused` makes a step in one launch or two. Otherwise its launches are,
each dependent on the one before:

1. `prepare_kernel`: fold the recurrent state (`gpu/state`), score all selection blocks (`score`)
2. `select_kernel`: select (`select`); with two levels the candidates, among which `fine_score_kernel` and
   `fine_select_kernel` select by their keys or the sketch of these (`fine`)
3. `attend_kernel`: selected blocks, residual, merge, combination (`attend`); `flashinfer` with that executor

Grids depend on shapes only; lengths, validity of states, and which rows are dense are decided on the device. Nothing
allocates or synchronises, so that a step can be captured in a CUDA graph.
"""

import itertools
import math
from typing import ClassVar

import torch
import triton
import triton.language as tl
from tqdm import tqdm

from ...interface import Limits
from ...layout import STATE_MAGIC
from ..capability import HOPPER
from ..checks import check_decode
from ..layer import GpuLayer
from ..state import fold_slice
from .attend import attend_constants, attend_kernel, mass_programs
from .fine import select_fine
from .flashinfer import FlashInferDecode
from .fused import FusedDecode, refusal
from .score import score_units
from .scratch import decode_scratch
from .select import select_units
from .tuning import DecodeSizes, Tuning, choose_tuning


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
    fold_arrivals_ptr,
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
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    FOLD_TILE: tl.constexpr,
    PHI: tl.constexpr,
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
    WHOLE: tl.constexpr,  # units of a row up to which all of it is attended to
    UNSCORED: tl.constexpr,  # the same, or with two levels what fits without a score
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    SELECTOR: tl.constexpr,
    WRITE_MASS: tl.constexpr,
    SPLITS: tl.constexpr,
    TRIGGER: tl.constexpr,  # a dependent launch follows
):
    """Grid (SLICES + SPLITS, G, rows): the first SLICES programs fold, the others score."""
    program = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    if TRIGGER:
        tl.extra.cuda.gdc_launch_dependents()
    if program < SLICES:
        fold_slice(
            row, head, program, query_ptr, kv_ptr, kv_int_ptr, state_ptr, state_int_ptr, query_start_loc_ptr,
            seq_lens_ptr, block_table_ptr, state_table_ptr, fold_arrivals_ptr, read_ptr, read_z_ptr, read_v_ptr,
            query_token_stride, query_head_stride, num_kv_heads, page_stride, head_stride,
            int_page_stride, int_head_stride, block_stride, block_head_stride, block_table_stride, state_table_stride,
            scale, MAGIC, STAMP_WORD, NUM_BLOCKS, BODY, SLICES, SLICE, GROUP, GROUP_P, QUERY_LEN, M, D, DP, PAGE, UNIT,
            WHOLE, FOLD_TILE, PHI,
        )  # fmt: skip
    else:
        score_units(
            row, head, program - SLICES, SPLITS, query_ptr, kv_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr,
            scores_ptr, mass_ptr, lse_ptr, query_token_stride, query_head_stride, page_stride, head_stride,
            block_table_stride, last_page, max_units, num_kv_heads, scale,
            GROUP, GROUP_P, N, D, DP, PAGE, UNIT, STRIDE, FP8, LOG_UNIT, UNSCORED, CHUNK, STAGES, SELECTOR,
            WRITE_MASS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["block_table_stride"])
def select_kernel(
    query_start_loc_ptr,
    seq_lens_ptr,
    block_table_ptr,
    scores_ptr,
    lse_ptr,
    sink_ptr,
    grouped_ptr,
    table_ptr,
    count_ptr,
    flags_ptr,
    units_ptr,
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
        sink_ptr, grouped_ptr, table_ptr, count_ptr, flags_ptr, units_ptr, block_table_stride, max_units, num_kv_heads,
        num_splits, GROUP, GROUP_P, PAGE, UNIT, BUDGET, BUDGET_P, FIRST, LAST, UNITS, WIDTH, SPLITS_P, TOP_P,
        DEPENDENT,
    )  # fmt: skip


class DecodeSteps:
    """SPLA decode of one layer.

    Args:
        layer: Which layer.
        limits: The largest step.
        executor: What attends to the selected pages: our own kernel (`spla`) or `flashinfer`.
        tuning: Launch shapes for every batch, instead of those that are chosen; these launches then take every batch,
            and `fused` none.

    Attributes:
        page_table: `[tokens, G, table]` int32, ids `(page * G + head) * blocks_per_page + block` of the last `decode`,
            ascending, the current block last (`page_table.py`); fine blocks where selection has two levels.
        page_counts: `[tokens, G]` int32, blocks of each list.
        scratch: Buffers between the launches, which all layers of one geometry share.
        fused: The launch that takes the batches that it pays for; None where it does not cover the layer.
        flashinfer: What attends with that executor.

    Raises:
        ValueError: Limits or an executor that these kernels do not cover.
    """

    _warm: ClassVar[set[tuple]] = set()

    def __init__(
        self, layer: GpuLayer, limits: Limits, *, executor: str = "spla", tuning: Tuning | None = None
    ) -> None:
        params = layer.params
        check_decode(params, layer.head_size, limits.max_query_len, limits.max_model_len, executor)
        self.layer, self.limits, self._tuning = layer, limits, tuning
        self.sizes = DecodeSizes.of(layer, limits)
        self.scratch = decode_scratch(layer, self.sizes, limits, self._tuning_for)
        table, width = self.scratch["table"], self.sizes.table
        self.page_table = table.view(-1)[: table[..., :width].numel()].view(*table.shape[:2], width)
        self.page_counts = self.scratch["count"]
        self.flashinfer = FlashInferDecode.shared(layer, self.page_table) if executor == "flashinfer" else None
        self.fused: FusedDecode | None = None
        refused = refusal(
            params,
            group=layer.group,
            head_size=layer.head_size,
            cache_dtype=layer.cache_dtype,
            has_sinks=layer.sinks is not None,
        )
        on_hopper = layer.device.type == "cuda" and layer.capability[0] == HOPPER
        if executor == "spla" and on_hopper and tuning is None and refused is None:
            self.fused = FusedDecode(layer, limits.max_model_len)
            self.fused.prepare(limits.max_num_rows)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the scratch, which all layers of one geometry share."""
        return sum(x.nbytes for x in self.scratch.values()) + (self.flashinfer.nbytes if self.flashinfer else 0)

    def tuning(self, num_rows: int, query_len: int) -> Tuning:
        """Launch shapes for `num_rows` rows of up to `query_len` query tokens."""
        return self._tuning_for(num_rows, query_len, self.sizes.budget)

    def _tuning_for(self, num_rows: int, query_len: int, budget: int) -> Tuning:
        return self._tuning or choose_tuning(self.layer, self.sizes, num_rows, query_len, budget)

    def warm_up(self) -> None:
        """Compile what steps of any number of decode rows need, so that no request has to wait for it.

        What the `flashinfer` executor needs is left to the captured graphs.
        """
        layer = self.layer
        key = (layer.device, layer.params, layer.cache_dtype, layer.num_heads, layer.num_kv_heads, layer.head_size,
               layer.sink_dtype, self.limits.max_num_rows, self.limits.max_query_len, self.sizes.max_units)  # fmt: skip
        if layer.device.type != "cuda" or key in self._warm:
            return
        self._warm.add(key)
        if self.flashinfer is None:
            steps = self.different_steps()
            for num_rows, query_len in tqdm(steps, desc="Compiling SPLA decode kernels", disable=len(steps) < 2):
                self.decode_padding(num_rows, query_len)
        torch.cuda.synchronize(layer.device)

    def different_steps(self) -> list[tuple[int, int]]:
        """A number of rows and of query tokens a row for each launch shape that decode outside of `fused` can take."""
        found: dict[tuple[Tuning, int], int] = {}
        most_tokens, most_rows = self.limits.max_query_len, self.limits.max_num_rows
        for query_len, num_rows in itertools.product({1, most_tokens}, range(1, most_rows + 1)):
            if not (self.fused and query_len == 1 and self.fused.pays(num_rows)):
                found.setdefault((self.tuning(num_rows, query_len), query_len), num_rows)
        return [(num_rows, query_len) for (_, query_len), num_rows in found.items()]

    def decode_padding(self, num_rows: int, query_len: int) -> None:
        """A decode step of rows that are all padding."""
        layer = self.layer
        pages = 1 + layer.state_layout.num_blocks
        cache = layer.empty_pages(pages)
        query = layer.zeros(num_rows * query_len, layer.num_heads, layer.head_size)
        starts = torch.zeros(num_rows + 1, dtype=torch.int32, device=layer.device)
        lens = torch.zeros(num_rows, dtype=torch.int32, device=layer.device)
        block_table = torch.zeros(num_rows, self.sizes.max_pages, dtype=torch.int32, device=layer.device)
        state_table = torch.zeros(num_rows, pages, dtype=torch.int32, device=layer.device)
        output = torch.empty_like(query)
        self.decode(query, cache, cache, starts, lens, block_table, state_table, output, query_len)

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
            query: `[tokens, H, d]`, unscaled, heads dense; those of a row side by side, row after row.
            kv_cache: `[num_pages, G, page_size + statistics_rows, 2 d]`, this step's tokens already in it.
            state_cache: State blocks of the same geometry; may be None without a residual.
            query_start_loc: `[rows + 1]` int32, where the tokens of each row begin, and where the last ends.
            seq_lens: `[rows]` int32, this step's tokens included; 0 marks padding.
            block_table: `[rows, pages]` int32.
            state_table: `[rows, >= K]` int32; may be None without a residual.
            output: `[tokens, H, d]`; what is behind the last row's tokens, padding, becomes zero.
            max_query_len: No row has more query tokens; all have one if it is 1.
            steady: The step has no tokens but these rows', so that all pages but those that they complete now have had
                their statistics before it began: these may be read while the launch ahead of this one still runs.
        """
        num_rows = seq_lens.shape[0]
        if num_rows == 0:
            return
        limits, layer, sizes, scratch = self.limits, self.layer, self.sizes, self.scratch
        if not (num_rows <= limits.max_num_rows and 1 <= max_query_len <= limits.max_query_len):
            raise ValueError(
                f"{num_rows} rows of {max_query_len} tokens exceed {limits.max_num_rows} of {limits.max_query_len}"
            )
        if state_cache is None or state_table is None:
            if sizes.slices:
                raise ValueError(f"residual {layer.params.residual!r} needs a state cache and its table")
            state_cache, state_table = kv_cache, block_table
        mass = scratch["mass"] if sizes.write_mass else scratch["scores"]
        if self.fused and max_query_len == 1 and query.dtype == layer.cache_dtype and self.fused.pays(num_rows):
            self.fused.run(
                query, kv_cache, state_cache, query_start_loc, seq_lens, block_table, state_table, output,
                self.page_table, scratch["count"], scratch["scores"], mass, scratch.get("candidates"),
                scratch.get("candidate_count"), early=steady,
            )  # fmt: skip
            return
        tuning = self.tuning(num_rows, max_query_len)
        self._prepare(
            tuning, query, kv_cache, state_cache, query_start_loc, seq_lens, block_table, state_table, max_query_len
        )
        self._select(tuning, query_start_loc, seq_lens, block_table, max_query_len)
        if sizes.candidates:
            select_fine(
                layer, sizes, scratch, tuning, query, kv_cache, query_start_loc, seq_lens, self.page_table,
                max_query_len,
            )  # fmt: skip
        if self.flashinfer is not None:
            self.flashinfer.attend(
                layer, sizes, scratch, tuning, query, kv_cache, query_start_loc, seq_lens, output, max_query_len
            )
            return
        attend_kernel[
            (tuning.attend_splits + mass_programs(layer, tuning), layer.num_kv_heads, num_rows * max_query_len)
        ](
            query_ptr=query,
            kv_ptr=kv_cache,
            query_start_loc_ptr=query_start_loc,
            seq_lens_ptr=seq_lens,
            table_ptr=self.page_table,
            count_ptr=scratch["count"],
            flags_ptr=scratch["flags"],
            mass_ptr=mass,
            part_out_ptr=scratch["part_out"],
            part_sum_ptr=scratch["part_sum"],
            rest_mass_ptr=scratch["rest_mass"],
            read_ptr=scratch["read"],
            read_z_ptr=scratch["read_z"],
            read_v_ptr=scratch["read_v"],
            arrivals_ptr=scratch["attend_arrivals"],
            gain_ptr=layer.gain,
            sink_ptr=layer.sinks,
            exact_weight_ptr=layer.norm_weights[0],
            tail_weight_ptr=layer.norm_weights[1],
            output_ptr=output,
            num_rows=num_rows,
            num_tokens=output.shape[0],
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            output_token_stride=output.stride(0),
            output_head_stride=output.stride(1),
            page_stride=kv_cache.stride(0),
            head_stride=kv_cache.stride(1),
            last_page=kv_cache.shape[0] - 1,
            max_units=sizes.max_units,
            num_kv_heads=layer.num_kv_heads,
            scale=layer.scale,
            residual_scale=layer.params.residual_scale,
            norm_eps=layer.params.rms_norm_eps,
            QUERY_LEN=max_query_len,
            UNIT=layer.params.attended_block,
            PER_UNIT=sizes.per_unit,
            SPLITS=tuning.attend_splits,
            DEPENDENT=layer.dependent,
            **attend_constants(layer, sizes, tuning),
            **layer.launch_early,
        )

    def _prepare(
        self,
        tuning: Tuning,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        state_table: torch.Tensor,
        max_query_len: int,
    ) -> None:
        """Fold the states and score, side by side."""
        layer, sizes, scratch, params = self.layer, self.sizes, self.scratch, self.layer.params
        kv_int = kv_cache.view(torch.int32)
        state, state_int = state_cache.view(torch.float32), state_cache.view(torch.int32)
        columns = triton.next_power_of_2(layer.group_p * max_query_len)
        prepare_kernel[(sizes.slices + tuning.score_splits, layer.num_kv_heads, seq_lens.shape[0])](
            query_ptr=query,
            kv_ptr=kv_cache,
            kv_int_ptr=kv_int,
            state_ptr=state,
            state_int_ptr=state_int,
            query_start_loc_ptr=query_start_loc,
            seq_lens_ptr=seq_lens,
            block_table_ptr=block_table,
            state_table_ptr=state_table,
            scores_ptr=scratch["scores"],
            mass_ptr=scratch["mass"],
            lse_ptr=scratch["lse"],
            fold_arrivals_ptr=scratch["fold_arrivals"],
            read_ptr=scratch["read"],
            read_z_ptr=scratch["read_z"],
            read_v_ptr=scratch["read_v"],
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            page_stride=kv_cache.stride(0),
            head_stride=kv_cache.stride(1),
            int_page_stride=kv_int.stride(0),
            int_head_stride=kv_int.stride(1),
            block_stride=state.stride(0),
            block_head_stride=state.stride(1),
            block_table_stride=block_table.stride(0),
            state_table_stride=state_table.stride(0),
            last_page=kv_cache.shape[0] - 1,
            max_units=sizes.max_units,
            num_kv_heads=layer.num_kv_heads,
            scale=layer.scale,
            MAGIC=STATE_MAGIC,
            STAMP_WORD=layer.page_layout.stamp_word,
            NUM_BLOCKS=layer.state_layout.num_blocks,
            BODY=layer.state_layout.rows_per_block - 1,
            SLICES=sizes.slices,
            SLICE=sizes.slice_size,
            FOLD_TILE=layer.fold_tile,
            PHI=layer.phi,
            GROUP=layer.group,
            GROUP_P=layer.group_p,
            QUERY_LEN=max_query_len,
            M=max(16, columns),
            N=max(8, columns),
            D=layer.head_size,
            DP=layer.dp,
            PAGE=params.page_size,
            UNIT=params.selection_block,
            STRIDE=layer.page_layout.statistics_stride,
            FP8=layer.page_layout.fp8_statistics,
            LOG_UNIT=math.log(params.selection_block),
            WHOLE=params.whole_blocks,
            # With two levels, candidates need scores beyond their number only, and the tail needs masses.
            UNSCORED=sizes.candidates if sizes.candidates and not layer.has_mass else params.whole_blocks,
            CHUNK=tuning.chunk,
            STAGES=tuning.score_stages,
            SELECTOR=layer.gpu_selector,
            WRITE_MASS=sizes.write_mass,
            SPLITS=tuning.score_splits,
            TRIGGER=layer.dependent,
            num_warps=tuning.score_warps,
            **({} if tuning.score_registers is None else {"maxnreg": tuning.score_registers}),
        )

    def _select(
        self,
        tuning: Tuning,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        max_query_len: int,
    ) -> None:
        """From the scores to `page_table`, or to the candidates."""
        layer, sizes, scratch, params = self.layer, self.sizes, self.scratch, self.layer.params
        two_levels = sizes.candidates > 0
        budget = sizes.candidates if two_levels else sizes.budget
        select_kernel[(layer.num_kv_heads, seq_lens.shape[0] * max_query_len)](
            query_start_loc_ptr=query_start_loc,
            seq_lens_ptr=seq_lens,
            block_table_ptr=block_table,
            scores_ptr=scratch["scores"],
            lse_ptr=scratch["lse"],
            sink_ptr=layer.score_sinks,
            grouped_ptr=scratch["grouped"],
            table_ptr=scratch["candidates"] if two_levels else self.page_table,
            count_ptr=scratch["candidate_count" if two_levels else "count"],
            flags_ptr=scratch["flags"],
            units_ptr=scratch["candidate_units"] if two_levels else None,
            block_table_stride=block_table.stride(0),
            max_units=sizes.max_units,
            num_kv_heads=layer.num_kv_heads,
            num_splits=tuning.score_splits,
            GROUP=layer.group,
            GROUP_P=layer.group_p,
            QUERY_LEN=max_query_len,
            PAGE=params.page_size,
            UNIT=params.selection_block,
            BUDGET=budget,
            BUDGET_P=triton.next_power_of_2(budget),
            FIRST=params.first_blocks,
            LAST=params.last_blocks,
            UNITS=sizes.units_p,
            WIDTH=sizes.width,
            SPLITS_P=triton.next_power_of_2(tuning.score_splits),
            TOP_P=0.0 if two_levels else layer.top_p,
            DEPENDENT=layer.dependent,
            num_warps=tuning.select_warps,
            **layer.launch_early,
        )
