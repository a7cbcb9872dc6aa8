"""What a step's prompt tokens need, from lengths that the host knows: nothing waits for the device.

Tokens below `dense_below` attend to everything, through FlashAttention (`gpu/dense.py`). All others are cut at fixed
positions into candidate tiles, and these into passes that fit into the scratch (`passes.py`). Rows that end within what
attends to everything only have their state brought up to date.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from ....algorithm.parameters import SplaParameters
from ...interface import Limits
from ..dense import DenseRows
from ..launch import Beside, Join, Launch
from .attend import Attend

TILE, CANDIDATE_TILE, TILE_STEP = 32, 64, 4
"""Tokens that share a selection, tokens that share their candidates, and of how many one is scored, at most. Together
they lose on a model what selection by token does (`docs/quality.md`)."""
SHORT_STEP = 4096
"""Prompt tokens of a step, below which the time of launches counts: selecting then begins to pay further on."""
LAUNCH_TOKENS = 880
"""Sparse prompt tokens that take as long as the launches of a layer (`benchmarks/results/prefill_h200.json`)."""

Group = tuple[int, int, int, int]
"""A candidate tile: row, first token in the batch, tokens, position of the first token."""


def prompt_parameters(params: SplaParameters, group: int) -> SplaParameters:
    """What prompt tokens compute: `params` with the tiles of these kernels, whatever decode computes of them.

    Args:
        params: Of a layer.
        group: Query heads a kv head: the fewer there are, the more tokens vote in as many rows of a product.
    """
    page = params.page_size & -params.page_size  # tiles are powers of two, as matrices are
    tile = min(TILE, page)
    while replace(params, tile=tile).max_forced_blocks > params.budget_blocks:
        tile //= 2  # to a selection block at least, which the budget has room for
    step = min(TILE_STEP, 1 << (group - 1).bit_length(), tile)
    params = replace(params, tile=tile, tile_step=step)
    if params.fine_block:
        params = replace(params, candidate_tile=min(CANDIDATE_TILE, page), fine_source="keys")
    return params


@dataclass(frozen=True)
class Pass:
    """Candidate tiles of sparse tokens."""

    groups: torch.Tensor  # [groups, 4] int32: row, first token, tokens, position of the first token
    places: torch.Tensor  # [groups] int32: place of the first token among the tokens of the pass
    group_state: torch.Tensor  # [groups] int32
    group_place: torch.Tensor  # [groups] int32: place of the row's first selection block among those of all rows
    runs: torch.Tensor  # [runs, 3] int32: first group, groups, row
    start_loc: torch.Tensor  # [G * tiles + 1] int32: places of the tiles' tokens, one kv head after the other
    num_tokens: int
    num_places: int  # selection blocks of complete pages, of all rows
    max_complete: int  # at least the selection blocks of every tile's complete pages
    launches: "Launches" = field(default_factory=dict, compare=False)

    @property
    def in_two_streams(self) -> bool:
        """Whether states are made beside the scores: to change streams takes 70 us of a processor, which waits for the
        device in long passes only."""
        return self.num_tokens >= SHORT_STEP


@dataclass(frozen=True)
class Folds:
    """Rows that end within what attends to everything: their state is brought up to date."""

    rows: torch.Tensor  # [folds, 4] int32: row, its complete pages, splits, place of the first split's sums
    items: torch.Tensor  # [items, 2] int32: fold, split
    most_splits: int  # of a row
    launches: "Launches" = field(default_factory=dict, compare=False)


Launches = dict[tuple, list[Launch | Beside | Join | Attend]]
"""Bound launches, by what layers differ in."""


@dataclass(frozen=True)
class PrefillPlan:
    """One step's prefill rows; all device memory in one buffer, copied once."""

    dense: list[DenseRows]
    passes: list[Pass]
    folds: Folds | None


def round_up_units(units: int) -> int:
    """Selection blocks that rows of scratch are laid out for, so that they begin at aligned addresses."""
    return -(-units // 16) * 16


class _Numbers:
    """Lists of integers that are copied to the device at once; each begins at a multiple of 16 bytes, which kernels are
    specialised for."""

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def add(self, numbers: Iterable[int]) -> slice:
        """Where they will be."""
        self._numbers += [0] * (-len(self._numbers) % 4)
        begin = len(self._numbers)
        self._numbers += numbers
        return slice(begin, len(self._numbers))

    def on(self, device: torch.device) -> torch.Tensor:
        """All of them `[numbers]` int32."""
        host = torch.tensor(self._numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)


@dataclass(frozen=True)
class _DenseRun:
    """Tokens of neighbouring rows that attend to everything, without others between them."""

    first_token: int
    rows: list[tuple[int, int, int]]  # row, tokens, length at the last of them

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens, _ in self.rows)


class Planner:
    """Cuts a step's prompt tokens.

    Args:
        params: What prompt tokens compute (`prompt_parameters`).
        num_kv_heads: Of the layers.
        limits: Where tokens begin to select.
        device: Where plans are.
        max_groups: Candidate tiles of a pass.
        max_places: Selection blocks that there are decoded statistics of.
        fold_programs: Programs that run at a time and sum the pages of rows.
        fold_pages: The fewest pages of a split where a row has several.

    Attributes:
        dense_below: Tokens at positions below it attend to everything; at least what is attended to whole. In short
            steps more do, where the limits say so.
    """

    def __init__(
        self,
        params: SplaParameters,
        num_kv_heads: int,
        limits: Limits,
        device: torch.device,
        *,
        max_groups: int,
        max_places: int,
        fold_programs: int,
        fold_pages: int,
    ) -> None:
        self._params, self._num_kv_heads, self._device = params, num_kv_heads, device
        # Tiles are sparse as a whole.
        size = params.coarse_tile
        self.dense_below = -(-max(limits.prefill_dense_below, params.whole_tokens) // size) * size
        self._where_it_pays = limits.where_it_pays
        self.max_groups, self.max_places = max_groups, max_places
        self.fold_programs, self._fold_pages = fold_programs, fold_pages

    def plan(self, first_row: int, starts: list[int], seq_lens: list[int]) -> PrefillPlan:
        """Dense rows and passes of a step's prefill rows.

        Args:
            first_row: Row of the batch of the first of them.
            starts: `[rows + 1]`, offsets of their query tokens in the batch.
            seq_lens: `[rows]`, tokens of each, this step's included.
        """
        page, size = self._params.page_size, self._params.coarse_tile
        dense_below, tokens = self.dense_below, starts[-1] - starts[0]
        if self._where_it_pays and tokens < SHORT_STEP:
            # A token attends densely in a time that grows with its position.
            dense_below = -(-dense_below * (tokens + LAUNCH_TOKENS) // (tokens * size)) * size
        dense: list[_DenseRun] = []
        groups: list[Group] = []
        folds: list[tuple[int, int]] = []
        for index, seq_len in enumerate(seq_lens):
            row, first = first_row + index, starts[index]
            start = seq_len - (starts[index + 1] - first)  # position of the row's first token
            split = min(max(dense_below, start), seq_len)
            if split > start:
                if not dense or dense[-1].first_token + dense[-1].num_tokens != first:
                    dense.append(_DenseRun(first, []))
                dense[-1].rows.append((row, split - start, split))
            if split == seq_len and seq_len >= page and self._params.residual != "none":
                folds.append((row, seq_len // page))
            edges = [split, *range((split // size + 1) * size, seq_len, size), seq_len]
            groups += [
                (row, first + begin - start, end - begin, begin)
                for begin, end in itertools.pairwise(edges)
                if begin < end
            ]
        numbers = _Numbers()
        of_dense = [self._dense_numbers(run, numbers) for run in dense]
        passes = list(self._cut(groups))
        of_passes = [self._pass_numbers(some, numbers) for some in passes]
        fold_rows, fold_items = self._cut_folds(folds)
        of_folds = [numbers.add(itertools.chain(*x)) for x in (fold_rows, fold_items)]
        buffer = numbers.on(self._device)
        return PrefillPlan(
            [self._dense_rows(run, *(buffer[x] for x in where)) for run, where in zip(dense, of_dense, strict=True)],
            [self._pass(some, [buffer[x] for x in where]) for some, where in zip(passes, of_passes, strict=True)],
            Folds(buffer[of_folds[0]].view(-1, 4), buffer[of_folds[1]].view(-1, 2), max(x[2] for x in fold_rows))
            if folds
            else None,
        )

    # Tokens that attend to everything ---------------------------------------------------------------------------

    @staticmethod
    def _dense_numbers(run: _DenseRun, numbers: _Numbers) -> tuple[slice, slice]:
        starts = itertools.accumulate((tokens for _, tokens, _ in run.rows), initial=0)
        return numbers.add(starts), numbers.add(length for *_, length in run.rows)

    @staticmethod
    def _dense_rows(run: _DenseRun, start_loc: torch.Tensor, seq_lens: torch.Tensor) -> DenseRows:
        return DenseRows(
            first_token=run.first_token,
            num_tokens=run.num_tokens,
            first_row=run.rows[0][0],
            start_loc=start_loc,
            seq_lens=seq_lens,
            max_query_len=max(tokens for _, tokens, _ in run.rows),
            max_seq_len=max(length for *_, length in run.rows),
        )

    # Tokens that select -----------------------------------------------------------------------------------------

    def _cut(self, groups: list[Group]) -> Iterator[list[Group]]:
        """The groups of one pass after the other: at most `max_groups`, of rows whose statistics there is room for."""
        some: list[Group] = []
        others = 0  # selection blocks of the rows before the last one
        for group in groups:
            another = bool(some) and some[-1][0] != group[0]
            before = self._units(some[-1]) if another else 0
            units = others + before + self._units(group)
            if some and (len(some) == self.max_groups or round_up_units(units) > self.max_places):
                yield some
                some, others, before = [], 0, 0
            some.append(group)
            others += before
        if some:
            yield some

    def _units(self, group: Group) -> int:
        """Selection blocks of complete pages before a group."""
        return group[3] // self._params.page_size * self._params.blocks_per_page

    def _pass_numbers(self, groups: list[Group], numbers: _Numbers) -> list[slice]:
        """What the kernels of a pass read, in the order of `Pass`."""
        page = self._params.page_size
        runs: list[list[int]] = []
        group_state, states, last = [], -1, None
        group_place, first_place, end = [], 0, 0
        for number, group in enumerate(groups):
            row, position = group[0], group[3]
            if not runs or runs[-1][2] != row:
                runs.append([number, 0, row])
                first_place = end
            end = first_place + self._units(group)
            group_place.append(first_place)
            runs[-1][1] += 1
            if last != (row, position // page):
                states, last = states + 1, (row, position // page)
            group_state.append(states)
        places = list(itertools.accumulate((tokens for _, _, tokens, _ in groups), initial=0))
        lists = (itertools.chain(*groups), places[:-1], group_state, group_place, itertools.chain(*runs))
        return [numbers.add(x) for x in (*lists, self._start_loc(groups, places))]

    def _start_loc(self, groups: list[Group], places: list[int]) -> list[int]:
        """Where the tokens of each tile begin among those of the pass, for one kv head after the other, and the end."""
        size, tile = self._params.coarse_tile, self._params.tile
        begins = [
            place + min(max(position // size * size + at - position, 0), tokens)
            for (_, _, tokens, position), place in zip(groups, places[:-1], strict=True)
            for at in range(0, size, tile)
        ]
        total, heads = places[-1], self._num_kv_heads
        return [head * total + begin for head in range(heads) for begin in begins] + [heads * total]

    def _pass(self, groups: list[Group], numbers: list[torch.Tensor]) -> Pass:
        rows = {group[0]: self._units(group) for group in groups}  # at the last of each row's groups
        return Pass(
            groups=numbers[0].view(-1, 4),
            places=numbers[1],
            group_state=numbers[2],
            group_place=numbers[3],
            runs=numbers[4].view(-1, 3),
            start_loc=numbers[5],
            num_tokens=sum(tokens for _, _, tokens, _ in groups),
            num_places=round_up_units(sum(rows.values())),
            max_complete=round_up_units(max(rows.values())),
        )

    # States -----------------------------------------------------------------------------------------------------

    def _cut_folds(self, folds: list[tuple[int, int]]) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """The rows of `Folds` and their splits: as many of all rows together as programs run at a time, and one of each
        row at least."""
        programs = max(1, self.fold_programs // self._num_kv_heads)
        share = max(self._fold_pages, -(-sum(pages for _, pages in folds) // programs))
        rows, items, place = [], [], 0
        for fold, (row, pages) in enumerate(folds):
            splits = max(1, pages // share)
            rows.append([row, pages, splits, place])
            items += [(fold, split) for split in range(splits)]
            place += splits if splits > 1 else 0
        return rows, items
