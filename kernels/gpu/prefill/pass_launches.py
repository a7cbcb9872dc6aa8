"""The launches of a pass, from scores to outputs, in the order in which they are made."""

import math
from collections.abc import Iterator
from typing import Any

import triton

from ..launch import Join, Launch
from ..residual import RESIDUAL_CODES
from .attend import Attend, address_unit, prompt_gather_kernel
from .bound import BoundLayer
from .combine import prompt_combine_kernel, prompt_rest_kernel
from .decode_statistics import KINDS, prompt_statistics_kernel
from .plan import Pass
from .score import MODES, prompt_mass_kernel, prompt_score_kernel
from .select import prompt_candidates_kernel, prompt_fine_kernel, prompt_select_kernel


class PassLaunches:
    """Launches of the pass `step` for all layers that are alike, `bound` one of them."""

    def __init__(self, bound: BoundLayer, step: Pass) -> None:
        self._bound, self._step = bound, step
        self._layer, self._sizes, self._scratch = layer, sizes, scratch = bound.layer, bound.sizes, bound.scratch
        params, kv, query, output = sizes.params, bound.own["kv"], bound.own["query"], bound.own["output"]
        self._heads = layer.num_kv_heads
        self._groups, self._tiles = len(step.groups), len(step.groups) * sizes.tiles
        self._max_units = step.max_complete  # of this pass: scratch is laid out anew each time
        self._slots = params.budget_blocks * sizes.per_unit
        # Arguments of several kernels.
        self._queries: dict[str, Any] = {
            "query_ptr": "query",
            "query_token_stride": query.stride(0),
            "query_head_stride": query.stride(1),
            "groups_ptr": step.groups,
        }
        self._outputs: dict[str, Any] = {
            "output_ptr": "output",
            "output_token_stride": output.stride(0),
            "output_head_stride": output.stride(1),
        }
        self._table: dict[str, Any] = {
            "block_table_ptr": "block_table",
            "block_table_stride": bound.own["block_table"].stride(0),
            "last_page": len(kv) - 1,
        }
        self._pages: dict[str, Any] = {
            **self._table,
            **bound.pages,
            "decoded_ptr": scratch.get("decoded"),
            "group_place_ptr": step.group_place,
            "num_places": step.num_places,
        }
        self._address = address_unit(kv)
        self._addresses: dict[str, Any] = {
            **self._table,
            "groups_ptr": step.groups,
            "page_stride": kv.stride(0) // self._address,
            "head_stride": kv.stride(1) // self._address,
            "max_units": self._max_units,
            "shares_ptr": scratch["shares"],
            "left_ptr": scratch.get("left"),
        }
        # Constants of several kernels.
        self._shape = {"GROUP": layer.group, "GROUP_P": layer.group_p, "D": layer.head_size, "DP": layer.dp}
        self._tiling = {"C": params.coarse_tile, "T": params.tile}
        self._voters = {**self._tiling, "STEP": params.tile_step, "ROWS": sizes.voters}
        self._units = {"PAGE": params.page_size, "UNIT": params.selection_block}
        self._forced = {"FIRST": params.first_blocks, "LAST": params.last_blocks}
        self._statistics: dict[str, Any] = {
            "STRIDE": layer.page_layout.statistics_stride,
            "LOG2_UNIT": math.log2(params.selection_block),
            "SELECTOR": layer.gpu_selector,
        }

    def __iter__(self) -> Iterator[Launch | Join | Attend]:
        """All of them; before the states are read, what runs beside is waited for."""
        layer, sizes = self._layer, self._sizes
        if layer.page_layout.formats is not None:
            yield self._decode_statistics(layer.page_layout.formats)
        yield self._score("normalise")
        yield self._score("share")
        if sizes.candidates:
            yield self._choose_candidates()
            yield self._score_fine_blocks()
        yield self._select()
        if layer.has_mass:
            yield self._mass_of_rest()
        yield self._gather()
        yield self._attend()
        if sizes.params.residual != "none":
            if self._step.in_two_streams:
                yield Join(layer.device)
            yield self._sum_rest()
        yield self._combine()

    def _splits(self, programs: int, steps: int) -> int:
        """Of loops of so many steps: a program for every multiprocessor, if each has two steps or more."""
        return max(1, min(self._sizes.tuning.most_splits, self._layer.num_sms // programs, steps // 2))

    @property
    def _fine_splits(self) -> int:
        """Of the loop over the candidates' keys."""
        sizes = self._sizes
        if not sizes.candidates:
            return 1
        steps = sizes.candidates * sizes.params.selection_block // sizes.fine_keys
        return self._splits(self._groups * self._heads, steps)

    @property
    def _mass_tokens(self) -> int:
        """Of a program that sums masses."""
        return max(1, min(self._sizes.params.tile, self._sizes.tuning.mass_rows // self._layer.group_p))

    @property
    def _mass_programs(self) -> int:
        """For each kv head and split."""
        return self._tiles * (self._sizes.params.tile // self._mass_tokens)

    @property
    def _mass_splits(self) -> int:
        """Of the loop over what is left out."""
        if not self._layer.has_mass:
            return 1
        return self._splits(self._mass_programs * self._heads, self._max_units // self._sizes.tuning.mass_chunk)

    # Scores -----------------------------------------------------------------------------------------------------

    def _decode_statistics(self, formats: tuple[tuple[str, int], ...]) -> Launch:
        """Statistics that are bytes, decoded."""
        units = 16  # of a program
        return self._bound.launch(
            prompt_statistics_kernel,
            (triton.cdiv(self._max_units, units), self._heads, len(self._step.runs)),
            {**self._pages, "groups_ptr": self._step.groups, "runs_ptr": self._step.runs},
            {
                **self._units,
                "D": self._layer.head_size,
                "STRIDE": self._layer.page_layout.statistics_stride,
                "KINDS": tuple(KINDS[kind] for kind, _ in formats),
                "SIZES": tuple(size for _, size in formats),
                "SIZE_P": triton.next_power_of_2(max(size for _, size in formats)),
                "UNITS": units,
                "num_warps": 4,
            },
        )

    def _score(self, mode: str) -> Launch:
        """Scores of selection blocks: what each token's are normalised by, then what the tokens share."""
        layer, sizes, tuning = self._layer, self._sizes, self._sizes.tuning
        splits = self._splits(self._groups * self._heads, self._max_units // tuning.score_chunk)
        return self._bound.launch(
            prompt_score_kernel,
            (self._groups, self._heads, splits),
            {
                **self._queries,
                **self._pages,
                "lse_ptr": self._scratch["lse"],
                "shares_ptr": self._scratch["shares"],
                "sink_ptr": None if layer.score_sinks is None else "sinks",
                "max_units": self._max_units,
                "num_norms": splits,
                "scale": layer.scale,
            },
            {
                **self._shape,
                **self._voters,
                **self._units,
                **self._statistics,
                "MODE": MODES[mode],
                "CHUNK": tuning.score_chunk,
                "STAGES": tuning.score_stages,
                "num_warps": sizes.voter_warps,
            },
        )

    # Selection --------------------------------------------------------------------------------------------------

    def _choose_candidates(self) -> Launch:
        """Selection blocks among which fine blocks are chosen."""
        sizes, params = self._sizes, self._sizes.params
        units_p = max(16, triton.next_power_of_2(self._max_units))
        return self._bound.launch(
            prompt_candidates_kernel,
            (self._groups, self._heads),
            {
                **self._addresses,
                "candidates_ptr": self._scratch["candidates"],
                "num_ptr": self._scratch["num"],
                "unit_stride": params.selection_block * 2 * self._layer.head_size // self._address,
            },
            {
                **self._tiling,
                **self._units,
                **self._forced,
                "MOST": sizes.candidates,
                "UNITS_P": units_p,
                "num_warps": sizes.select_warps(units_p),
            },
        )

    def _score_fine_blocks(self) -> Launch:
        """Masses of the candidates' fine blocks, from their keys."""
        sizes, params = self._sizes, self._sizes.params
        return self._bound.launch(
            prompt_fine_kernel,
            (self._groups, self._heads, self._fine_splits),
            {
                **self._queries,
                "kv_ptr": "kv",
                "candidates_ptr": self._scratch["candidates"],
                "num_ptr": self._scratch["num"],
                "fine_ptr": self._scratch["fine"],
                "norm_ptr": self._scratch["norm"],
                "scale": self._layer.scale,
            },
            {
                **self._shape,
                **self._voters,
                "ADDRESS": self._address,
                "UNIT": params.selection_block,
                "FINE": params.attended_block,
                "MOST": sizes.candidates,
                "KEYS": sizes.fine_keys,
                "STAGES": sizes.tuning.fine_stages,
                "num_warps": sizes.voter_warps,
            },
        )

    def _select(self) -> Launch:
        """What a tile attends to."""
        layer, sizes, params = self._layer, self._sizes, self._sizes.params
        units_p = max(16, triton.next_power_of_2(sizes.candidates or self._max_units))
        return self._bound.launch(
            prompt_select_kernel,
            (self._tiles, self._heads),
            {
                **self._addresses,
                "candidates_ptr": self._scratch.get("candidates"),
                "num_ptr": self._scratch.get("num"),
                "fine_ptr": self._scratch.get("fine"),
                "norm_ptr": self._scratch.get("norm"),
                "sink_ptr": None if layer.sinks is None else "sinks",
                "table_ptr": self._scratch["table"],
                "used_ptr": self._scratch["used"],
                "count_ptr": self._scratch["count"],
                "block_stride": params.attended_block * 2 * layer.head_size // self._address,
                "splits": self._fine_splits,
            },
            {
                **self._voters,
                **self._units,
                **self._forced,
                "GROUP": layer.group,
                "GROUP_P": layer.group_p,
                "BLOCK": params.attended_block,
                "BUDGET": params.budget_blocks,
                "MOST": sizes.candidates,
                "SLOTS": self._slots,
                "UNITS_P": units_p,
                "CURRENT_P": triton.next_power_of_2(params.page_size // params.attended_block),
                "FINE_BLOCKS": sizes.fine_blocks,
                "SOME": min(sizes.tuning.select_voters, max(1, sizes.voters // sizes.tiles)),
                "TOP_P": layer.top_p,
                "num_warps": max(4 if sizes.candidates else 1, sizes.select_warps(units_p * sizes.per_unit)),
            },
        )

    def _mass_of_rest(self) -> Launch:
        """The mass, for each token, of what its tile left out."""
        tuning = self._sizes.tuning
        return self._bound.launch(
            prompt_mass_kernel,
            (self._mass_programs, self._heads, self._mass_splits),
            {
                **self._queries,
                **self._pages,
                "left_ptr": self._scratch["left"],
                "mass_ptr": self._scratch["mass"],
                "max_units": self._max_units,
                "scale": self._layer.scale,
            },
            {
                **self._shape,
                **self._tiling,
                **self._units,
                **self._statistics,
                "TM": self._mass_tokens,
                "CHUNK": tuning.mass_chunk,
                "STAGES": tuning.mass_stages,
                "num_warps": tuning.mass_warps,
            },
        )

    # Attention and the rest -------------------------------------------------------------------------------------

    def _gather(self) -> Launch:
        """Queries by kv head, as FlashAttention takes them."""
        size = self._sizes.params.coarse_tile
        tokens = max(1, min(size, 32 // self._layer.group_p))
        return self._bound.launch(
            prompt_gather_kernel,
            (self._groups, self._heads, size // tokens),
            {
                **self._queries,
                "places_ptr": self._step.places,
                "gathered_ptr": self._scratch["gathered"],
                "num_tokens": self._step.num_tokens,
            },
            {**self._shape, "TM": tokens, "num_warps": 4},
        )

    def _attend(self) -> Attend:
        """Exact attention to what was selected."""
        tokens, tiles = self._heads * self._step.num_tokens, self._heads * self._tiles
        return Attend(
            gathered=self._scratch["gathered"][:tokens],
            table=self._scratch["table"].flatten()[: tiles * self._slots].view(tiles, self._slots),
            used=self._scratch["used"][:tiles],
            exact=self._scratch["exact"][:tokens],
        )

    def _sum_rest(self) -> Launch:
        """The state less the selected."""
        layer, sizes, params, tuning = self._layer, self._sizes, self._sizes.params, self._sizes.tuning
        features = layer.dp if sizes.linear else min(layer.dp, tuning.rest_slice)
        return self._bound.launch(
            prompt_rest_kernel,
            (self._tiles, self._heads, layer.dp // features),
            {
                "kv_ptr": "kv",
                "groups_ptr": self._step.groups,
                "group_state_ptr": self._step.group_state,
                "table_ptr": self._scratch["table"],
                "count_ptr": self._scratch["count"],
                "state_ptr": self._scratch["states"],
                "rest_ptr": self._scratch["rest"],
                "sums_ptr": self._scratch["rest_sums"],
            },
            {
                **self._tiling,
                "D": layer.head_size,
                "DP": layer.dp,
                "ADDRESS": self._address,
                "PAGE": params.page_size,
                "BLOCK": params.attended_block,
                "SLOTS": self._slots,
                "KEYS": tuning.rest_keys,
                "SLICE": features,
                "S_ROWS": sizes.state_rows,
                "STAGES": tuning.rest_stages,
                "PHI": layer.phi,
                "num_warps": tuning.rest_warps,
            },
        )

    def _combine(self) -> Launch:
        """The output."""
        layer, sizes, params, tuning = self._layer, self._sizes, self._sizes.params, self._sizes.tuning
        tokens = max(1, min(params.tile, tuning.combine_rows // layer.group_p))
        return self._bound.launch(
            prompt_combine_kernel,
            (self._tiles * (params.tile // tokens), self._heads),
            {
                **self._queries,
                **self._outputs,
                "places_ptr": self._step.places,
                "count_ptr": self._scratch["count"],
                "mass_ptr": self._scratch.get("mass"),
                "rest_ptr": self._scratch.get("rest"),
                "sums_ptr": self._scratch.get("rest_sums"),
                "exact_ptr": self._scratch["exact"],
                "lse_ptr": "lse",
                "sink_ptr": None if layer.sinks is None else "sinks",
                "gain_ptr": "gain",
                "exact_weight_ptr": "exact_weight",
                "tail_weight_ptr": "tail_weight",
                "num_tokens_of_pass": self._step.num_tokens,
                "mass_splits": self._mass_splits,
                "scale": layer.scale,
                "residual_scale": params.residual_scale,
                "norm_eps": params.rms_norm_eps,
            },
            {
                **self._shape,
                **self._tiling,
                **self._units,
                "TM": tokens,
                "BLOCK": params.attended_block,
                "FEATURES": layer.dp if sizes.linear else min(layer.dp, tuning.combine_features),
                "RESIDUAL": RESIDUAL_CODES[params.residual],
                "PHI": layer.phi,
                "DOUBLE_NORM": params.combine == "double_rmsnorm",
                "num_warps": tuning.combine_warps,
            },
        )
