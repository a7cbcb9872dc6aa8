"""What runs on a CPU over paged memory, vectorised torch and its compiled form, against the float64 reference: random
shapes, chunks and batches.

Memory is hostile: page ids are shuffled, and every page, output and state block holds NaN until it is written.
A float32 selection may rightly differ from a float64 one where two candidates are all but equal; such examples are told
by the reference's own scores, dropped and counted.
"""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spla_backend.algorithm import reference as ref
from spla_backend.algorithm.feature_maps import feature_map_names, get_feature_map
from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.residual import make_residual
from spla_backend.algorithm.selection import group_scores, select_blocks
from spla_backend.algorithm.selectors import get_selector, selector_names
from spla_backend.algorithm.sketch import FINE_SOURCES
from spla_backend.algorithm.statistics_format import COUNT, E4M3, E5M2, decode, encode
from spla_backend.algorithm.two_level import coarse_parameters
from spla_backend.kernels.cpu import compiled
from spla_backend.kernels.cpu.attention import CpuAttention, FlatCache
from spla_backend.kernels.cpu.vectorised import VectorisedAttention
from spla_backend.kernels.interface import Layer as LayerSizes
from spla_backend.kernels.interface import Step

torch.set_num_threads(1)

TOLERANCE = 1e-5  # relative L2
NEAR_TIE = 2e-5  # nats, and share of the mass for top-p
MAX_LENGTH = 900

settings.register_profile("spla", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("spla-ci", settings.get_profile("spla"), derandomize=True)
PROFILE = settings.get_profile("spla-ci" if os.environ.get("CI") else "spla")


# What is drawn


@dataclass(frozen=True)
class Shape:
    """A layer: its parameters and sizes. The representation is what a failing example shows."""

    params: SplaParameters
    kv_heads: int
    group: int
    head_size: int
    heads_outermost: bool  # strides of the cache: [kv_heads, pages, ...] in memory instead of [pages, kv_heads, ...]
    query_std: float
    seed: int
    implementation: type[VectorisedAttention] = VectorisedAttention
    sinks: torch.dtype | None = None  # of the layer's attention sinks

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@st.composite
def shapes(
    draw: st.DrawFn, max_page: int = 128, implementation: type[VectorisedAttention] = VectorisedAttention
) -> Shape:
    """Any supported layer; of those that are compiled, where the compiled implementation is asked for."""
    compiled = implementation is CpuAttention
    page = 16 * draw(st.integers(1, max_page // 16), label="page / 16")
    block = draw(st.sampled_from([b for b in (16, 32, page) if page % b == 0]), label="selection block")
    first, last = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    least = first + max(last, page // block)
    combine = "shared_normalizer" if compiled else draw(st.sampled_from(["shared_normalizer", "double_rmsnorm"]))
    selector = draw(st.sampled_from(ref.SELECTORS))
    with_mass = get_selector(selector).has_mass or combine == "double_rmsnorm"
    residuals = ["regression", "none"] if compiled else ["regression", "linear", "none"]
    params = SplaParameters(
        page_size=page,
        selection_block=block,
        budget_blocks=least + draw(st.integers(0, 4), label="blocks to choose"),
        first_blocks=first,
        last_blocks=last,
        selector=selector,
        statistics_dtype=draw(st.sampled_from(["auto", "auto", "fp8"])),
        fine_block=draw(st.sampled_from([0, *(f for f in (8, 16, 32) if block % f == 0)]), label="fine block"),
        least_candidates=draw(st.sampled_from([0, 3 * (least + 1)]), label="candidates"),
        fine_source=draw(st.sampled_from(FINE_SOURCES if get_selector(selector).mean_first else ["keys"])),
        top_p=draw(st.sampled_from([None, None, 0.5, 0.9, 1.0])),
        residual=draw(st.sampled_from(residuals if with_mass else ["none"])),
        feature_map=draw(st.sampled_from(ref.FEATURE_MAPS)),
        residual_scale=draw(st.sampled_from([0.5, 1.0])),
        combine=combine,
    )
    group = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16]))
    return Shape(
        params=params,
        kv_heads=draw(st.integers(1, 3 if group < 7 else 1), label="kv heads"),
        group=group,
        head_size=draw(st.sampled_from([64, 80, 96, 128, 256])),
        heads_outermost=draw(st.booleans()),
        query_std=draw(st.sampled_from([0.3, 1.0, 2.0])),
        seed=draw(st.integers(0, 2**16)),
        implementation=implementation,
        sinks=draw(st.sampled_from([None, torch.float32, torch.bfloat16])) if combine == "shared_normalizer" else None,
    )


def lengths(params: SplaParameters) -> st.SearchStrategy[int]:
    """Lengths about the edges of pages and of the budget."""
    page, budget = params.page_size, params.budget_tokens
    edges = [page, 2 * page, budget, budget + page, (budget // page + 2) * page, (budget // page + 4) * page]
    if params.fine_block:
        candidates = params.candidate_blocks * params.selection_block
        edges += [budget + params.fine_block, params.whole_tokens]
        edges += [candidates, candidates + page, (candidates // page + 2) * page]
    about = st.builds(lambda edge, off: max(1, edge + off), st.sampled_from(edges), st.integers(-1, 2))
    anywhere = st.integers(1, max(edges) + page)
    return st.one_of(about, about, anywhere).map(lambda length: min(length, MAX_LENGTH))


# What it is compared on


@dataclass
class Sequence_:
    """One request: its tokens, its pages and its state blocks."""

    q: Tensor  # [L, H, d] float32, unscaled
    k: Tensor  # [L, G, d] float32
    v: Tensor  # [L, G, d] float32
    pages: Tensor  # [pages] int64
    state: Tensor  # [K] int64


class Layer:
    """A layer's cache with some sequences in it, and the reference on the same tokens."""

    def __init__(self, shape: Shape, seq_lens: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.params = shape, shape.params
        self.gen = torch.Generator().manual_seed(shape.seed)
        heads, d = shape.heads, shape.head_size
        self.scale = d**-0.5
        self.gain = 0.5 + torch.rand(heads, generator=self.gen)
        self.norm_weights = (self.normal(heads, d), self.normal(heads, d))
        sinks = self.sinks = None
        if shape.sinks is not None:  # loaded after the layer was made, from next to nothing to next to all of the mass
            sinks = torch.nn.Parameter(torch.full((heads,), math.nan, dtype=shape.sinks))
        self.op = shape.implementation(
            self.params,
            LayerSizes(heads, shape.kv_heads, d, dtype, self.scale, self.gain, self.norm_weights, sinks=sinks),
        )
        if sinks is not None:
            sinks.data.copy_(5 * self.normal(heads))
            self.sinks = sinks.detach().double()
        per_sequence = [-(-length // self.params.page_size) for length in seq_lens]
        num_states = max(1, self.op.state_layout.num_blocks)
        self.kv_cache = self.poisoned(sum(per_sequence) + 4, dtype)
        self.state_cache = self.poisoned(num_states * (len(seq_lens) + 1) + 1, dtype)
        # Page 0 is the engine's null page: nobody owns it, and it stands in the padding of tables.
        pages = 1 + torch.randperm(len(self.kv_cache) - 1, generator=self.gen)
        states = 1 + torch.randperm(len(self.state_cache) - 1, generator=self.gen)
        self.sequences = []
        for i, (length, num_pages) in enumerate(zip(seq_lens, per_sequence, strict=True)):
            first = sum(per_sequence[:i])
            drift = self.normal(length // 16 + 1, shape.kv_heads, d).repeat_interleave(16, dim=0)[:length]
            self.sequences.append(
                Sequence_(
                    q=(self.normal(length, heads, d) * shape.query_std).to(dtype).float(),
                    k=(self.normal(length, shape.kv_heads, d) + drift).to(dtype).float(),
                    v=self.normal(length, shape.kv_heads, d).to(dtype).float(),
                    pages=pages[first : first + num_pages],
                    state=states[i * num_states : (i + 1) * num_states],
                )
            )

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.gen)

    def poisoned(self, num_pages: int, dtype: torch.dtype) -> Tensor:
        """`[num_pages, G, rows, 2 d]` of NaN in the drawn memory order."""
        rows, kv_heads = self.op.page_layout.rows, self.shape.kv_heads
        size = (kv_heads, num_pages) if self.shape.heads_outermost else (num_pages, kv_heads)
        cache = torch.full((*size, rows, 2 * self.shape.head_size), math.nan, dtype=dtype)
        return cache.transpose(0, 1) if self.shape.heads_outermost else cache

    def write(self, *spans: tuple[int, int, int]) -> None:
        """Tokens of spans (sequence, start, end) go into the cache in one step, with padding behind them."""
        page_size = self.params.page_size
        pad = torch.full((1, self.shape.kv_heads, self.shape.head_size), math.nan)
        keys, values, slots = [], [], []
        for index, start, end in spans:
            sequence, position = self.sequences[index], torch.arange(start, end)
            keys.append(sequence.k[start:end])
            values.append(sequence.v[start:end])
            slots.append(sequence.pages[position // page_size] * page_size + position % page_size)
        self.op.update_cache(
            torch.cat([*keys, pad]), torch.cat([*values, pad]), self.kv_cache, torch.cat([*slots, torch.tensor([-1])])
        )

    def forward(self, rows: Sequence[tuple[int, int, int] | None], decode_query_len: int = 1) -> list[Tensor]:
        """One step over rows of (sequence, start, end), written before; None is a padded row. Those ahead of the first
        of more than `decode_query_len` tokens are decode rows.

        Returns:
            The output `[end - start, H, d]` of each row.
        """
        seq_lens = [0 if row is None else row[2] for row in rows]
        query_lens = [0 if row is None else row[2] - row[1] for row in rows]
        starts = torch.tensor([0, *query_lens]).cumsum(0)
        num_tokens = int(starts[-1]) + 3  # a graph's batch is padded with tokens that no row owns
        heads, d = self.shape.heads, self.shape.head_size
        query = torch.full((num_tokens, heads, d), math.nan)
        output = torch.full((num_tokens, heads, d), math.nan)
        width = max([1, *(-(-length // self.params.page_size) for length in seq_lens)]) + 2
        # Behind a row's pages stands what the row held before: ids of pages of others.
        block_table = torch.randint(len(self.kv_cache), (len(rows), width), generator=self.gen)
        state_table = torch.zeros(len(rows), max(1, self.op.state_layout.num_blocks), dtype=torch.int32)
        for i, row in enumerate(rows):
            if row is None:
                block_table[i] = 0
                continue
            sequence, start, end = self.sequences[row[0]], row[1], row[2]
            query[starts[i] : starts[i + 1]] = sequence.q[start:end]
            used = -(-end // self.params.page_size)
            block_table[i, :used] = sequence.pages[:used]
            state_table[i] = sequence.state
        lens = torch.tensor(seq_lens, dtype=torch.int32)
        step = Step.of(starts.to(torch.int32), lens, block_table.to(torch.int32), decode_query_len)
        self.op.run(self.op.plan(step), query, self.kv_cache, self.state_cache, state_table, output)
        assert bool(output[int(starts[-1]) :].isnan().all()), "a token that no row owns was written"
        return [output[starts[i] : starts[i + 1]] for i in range(len(rows))]

    def reference(self, index: int, position: int, statistics: Tensor | None = None) -> ref.TokenResult:
        """The definition, for one token; `statistics` as `ref.spla_token` takes them."""
        sequence = self.sequences[index]
        return ref.spla_token(
            sequence.q[position].double() * self.scale,
            sequence.k[: position + 1].double(),
            sequence.v[: position + 1].double(),
            self.params,
            statistics=statistics,
            gain=self.gain.double(),
            norm_weights=(self.norm_weights[0].double(), self.norm_weights[1].double()),
            sinks=self.sinks,
        )

    def stored_statistics(self, index: int, num_pages: int) -> Tensor:
        """What the first pages of a sequence hold, `[num_pages * B / b, G, width]` float64."""
        statistics = self.op.page_layout.statistics(self.kv_cache[self.sequences[index].pages[:num_pages]])
        return statistics.transpose(1, 2).flatten(0, 1).double()  # [blocks, G, width]


class Ties:
    """How many examples were compared, and how many were dropped."""

    compared = 0
    dropped = 0


@pytest.fixture(scope="module", autouse=True)
def near_ties_are_rare() -> Iterator[None]:
    yield
    assert Ties.dropped <= 1 + Ties.compared // 20, f"{Ties.dropped} near-ties beside {Ties.compared} examples"


def near_tie(result: ref.TokenResult, position: int, params: SplaParameters) -> bool:
    """Whether rounding may decide what this token selects."""
    if position < params.whole_tokens:
        return False
    forced, per_block = ref.forced_blocks(position, params), params.selection_block // params.attended_block
    for of_blocks, of_fine, blocks in zip(result.group_scores, result.fine_scores, result.selected, strict=True):
        scores, of_level = dict(enumerate(of_blocks.tolist())), forced
        if params.fine_block:
            coarse = coarse_parameters(params)
            candidates = ref.select_blocks(of_blocks, position, coarse)
            if position >= coarse.budget_tokens and near_rank(scores, candidates, forced):
                return True
            scores = {block: float(score) for block, score in of_fine.items()}
            of_level = [block * per_block + i for block in forced for i in range(per_block)]
        if near_rank(scores, blocks, of_level) or near_top_p(scores, blocks, of_level, params.top_p):
            return True
    return False


def near_rank(scores: dict[int, float], blocks: Sequence[int], forced: Sequence[int]) -> bool:
    """Whether the best block left out is all but as good as the worst one chosen."""
    free = [block for block in scores if block not in forced]
    taken = [scores[block] for block in free if block in blocks]
    left = [scores[block] for block in free if block not in blocks]
    return bool(taken and left) and min(taken) - max(left) < NEAR_TIE


def near_top_p(scores: dict[int, float], blocks: Sequence[int], forced: Sequence[int], top_p: float | None) -> bool:
    """Whether the mass covered after some chosen block is all but the one at which to stop."""
    if top_p is None or top_p >= 1:
        return False
    total = ref.logsumexp(list(scores.values()))
    mass = {block: math.exp(score - total) for block, score in scores.items()}
    taken = sorted((mass[block] for block in blocks if block not in forced), reverse=True)
    covered = sum(mass[block] for block in forced if block in mass)
    return any(abs(covered + sum(taken[:i]) - top_p) < NEAR_TIE for i in range(len(taken) + 1))


def compare(layer: Layer, index: int, start: int, got: Tensor, positions: Sequence[int]) -> None:
    """Check the outputs `got [end - start, H, d]` of a sequence at some of its positions; statistics in fp8, and those
    from which sketches count, are taken as they are stored."""
    wants = {}
    for position in positions:
        of_bytes = layer.params.statistics_dtype == "fp8" or layer.params.has_sketch
        stored = layer.stored_statistics(index, position // layer.params.page_size) if of_bytes else None
        wants[position] = layer.reference(index, position, stored)
    if any(near_tie(want, position, layer.params) for position, want in wants.items()):
        Ties.dropped += 1
        event("near-tie")
        assume(False)
    Ties.compared += 1
    for position, want in wants.items():
        error = relative_error(got[position - start], want.output)
        assert error < TOLERANCE, f"sequence {index}, position {position}"
    assert bool(got.isfinite().all())


def relative_error(got: Tensor, want: Tensor) -> float:
    """`|got - want| / |want|`; NaN in `got` is an infinite error."""
    error = float((got.double() - want).norm() / want.norm())
    return math.inf if math.isnan(error) else error


def sample_positions(start: int, end: int, params: SplaParameters, count: int = 5) -> list[int]:
    """First and last position, both sides of where rows are whole and of some pages' edges, of `start .. end - 1`."""
    page, whole = params.page_size, params.whole_tokens
    inner = [whole - 1, whole, end // page * page - 1, end // page * page, (start // page + 2) * page]
    return sorted({start, end - 1, *[p for p in inner if start <= p < end][:count]})


# The parts


@pytest.mark.parametrize("selector", ref.SELECTORS)
@settings(PROFILE, max_examples=15)
@given(data=st.data())
def test_selector(selector: str, data: st.DataObject) -> None:
    """Statistics, scores and masses of a batch of blocks."""
    block = 16 * data.draw(st.integers(1, 8), label="block / 16")
    d = data.draw(st.sampled_from([64, 80, 128]), label="head size")
    std = data.draw(st.sampled_from([0.0, 0.3, 3.0]), label="query std")
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    keys = torch.randn(2, 3, block, d, generator=gen) + torch.randn(2, 3, 1, d, generator=gen)
    keys[0, 0] = keys[0, 0, :1]  # equal keys: no variance, an empty cluster
    keys[0, 1, block // 2 :] = keys[0, 1, 0]  # repeated keys
    keys[0, 2, 3] *= 10  # an outlier
    q = torch.randn(2, 4, d, generator=gen) * std * d**-0.5
    implementation = get_selector(selector)
    assert implementation.width(d) == ref.statistics_width(selector, d)
    statistics = implementation.statistics(keys)
    score = implementation.score(q, statistics, block)  # [2, 4, 3]
    mass = implementation.mass(q, statistics, block) if implementation.has_mass else None
    for i in range(2):
        for j in range(3):
            want = ref.block_statistics(selector, keys[i, j].double())
            if (i, j) != (0, 0):  # which of two clusters is the empty one, rounding decides: see the scores
                assert relative_error(statistics[i, j], want) < TOLERANCE
            for n in range(4):
                exact_score = ref.selection_score(selector, q[i, n].double(), want, block)
                assert float(score[i, n, j]) == pytest.approx(exact_score, rel=1e-5, abs=1e-5)
                if mass is not None:
                    exact_mass = ref.mass_score(selector, q[i, n].double(), want, block)
                    assert float(mass[i, n, j]) == pytest.approx(exact_mass, rel=1e-5, abs=1e-5)


def test_quest_has_no_mass() -> None:
    quest = get_selector("quest")
    assert not quest.has_mass
    with pytest.raises(ValueError, match="quest"):
        quest.mass(torch.zeros(1, 4), torch.zeros(1, 8), 16)


def test_names_agree() -> None:
    assert set(ref.SELECTORS) <= set(selector_names())
    assert set(ref.FEATURE_MAPS) <= set(feature_map_names())
    for unknown in (get_selector, get_feature_map):
        with pytest.raises(ValueError, match="choose one of"):
            unknown("no such name")


@pytest.mark.parametrize("name", ref.FEATURE_MAPS)
def test_feature_map(name: str) -> None:
    x = 3 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert relative_error(get_feature_map(name)(x), ref.apply_feature_map(name, x.double())) < TOLERANCE


@settings(PROFILE, max_examples=150)
@given(data=st.data())
def test_select_blocks(data: st.DataObject) -> None:
    """Top-k and top-p on scores with exact ties and with masses that underflow."""
    num_pages = data.draw(st.integers(2, 12), label="complete pages")
    params = SplaParameters(
        page_size=32,
        selection_block=data.draw(st.sampled_from([16, 32]), label="selection block"),
        budget_blocks=data.draw(st.integers(4, 10), label="budget"),
        first_blocks=data.draw(st.integers(0, 2), label="first"),
        last_blocks=data.draw(st.integers(1, 2), label="last"),
        top_p=data.draw(st.sampled_from([None, 0.3, 0.9, 0.999, 1.0]), label="top_p"),
    )
    position = num_pages * 32 + data.draw(st.integers(0, 31), label="offset")
    num_blocks = num_pages * params.blocks_per_page
    current = position // params.selection_block
    if params.budget_blocks <= current:
        spread = data.draw(st.sampled_from([1, 40, 500]), label="spread")
        drawn = st.lists(st.integers(-5, 0), min_size=num_blocks, max_size=num_blocks)
        group = data.draw(st.sampled_from([1, 4]), label="group")
        heads = [data.draw(drawn, label=f"scores of kv head {g}") for g in (0, 1)]
        scores = (torch.tensor(heads, dtype=torch.float64) * spread).log_softmax(-1) + math.log(group)
        want = [ref.select_blocks(scores[g], position, params) for g in (0, 1)]
        always = ref.forced_blocks(position, params)
        near = [near_top_p(dict(enumerate(scores[g].tolist())), want[g], always, params.top_p) for g in (0, 1)]
        assume(not any(near))
        forced = torch.tensor([block in always for block in range(num_blocks)])
        num_free = params.budget_blocks - (current + 1 - num_blocks) - int(forced.sum())
        for free in (num_free, torch.tensor([[num_free]])):
            got = select_blocks(scores.float()[None, :, None], forced[None, None], free, params.top_p)
            for g in (0, 1):
                assert got[0, g, 0].nonzero().flatten().tolist() == [i for i in want[g] if i < num_blocks]


@settings(PROFILE, max_examples=30)
@given(data=st.data())
def test_group_scores(data: st.DataObject) -> None:
    """Sharing in the log domain, beside incomplete blocks that hold NaN."""
    group = data.draw(st.sampled_from([1, 3, 16]), label="group")
    spread = data.draw(st.sampled_from([1, 300]), label="spread")
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16), label="seed"))
    num_complete = torch.tensor([7, 0, 3])
    scores = torch.randn(3, 2, 4, group, 7, generator=gen) * spread
    complete = torch.arange(7) < num_complete[:, None]
    scores.masked_fill_(~complete[:, None, None, None], math.nan)
    got = group_scores(scores, complete)
    assert bool((got.movedim(-1, 1)[~complete] == -math.inf).all())
    for row, kv_head, token in [(0, 0, 0), (0, 1, 3), (2, 0, 2)]:
        n = int(num_complete[row])
        want = ref.share_in_group(scores[row, kv_head, token, :, :n].double())
        torch.testing.assert_close(got[row, kv_head, token, :n].double(), want, rtol=1e-5, atol=1e-5)


# The whole

both = pytest.mark.parametrize("implementation", [VectorisedAttention, CpuAttention])


@settings(PROFILE, max_examples=40)
@given(shape=shapes(), data=st.data())
def test_statistics_in_the_page(shape: Shape, data: st.DataObject) -> None:
    """Statistics of complete pages are where docs/design.md, 5 puts them, and pages are complete at their last slot."""
    length = data.draw(lengths(shape.params), label="length")
    layer = Layer(shape, [length])
    cut = data.draw(st.integers(0, length), label="written at once")
    layer.write((0, 0, cut))
    layer.write((0, cut, length))
    page = shape.params.page_size
    complete = length // page
    # The reference stops below the last token's page; one more token makes the last full page a complete one.
    keys = torch.cat([layer.sequences[0].k, layer.sequences[0].k[:1]]).double()[: complete * page + 1]
    if complete:
        want = ref.complete_statistics(keys, shape.params)
        if shape.params.statistics_dtype == "auto":
            assert relative_error(layer.stored_statistics(0, complete), want) < TOLERANCE
        else:  # the nearest byte, or its neighbour where float32 rounds otherwise
            layout, pages = layer.op.page_layout, layer.kv_cache[layer.sequences[0].pages[:complete]]
            got = layout.stored(layout.area(pages)).transpose(1, 2).flatten(0, 1).int()  # [blocks, G, width]
            off = (got - encode(want.float(), layout.formats).int()).abs()
            assert int(off.max()) <= 1 and float(off.float().mean()) < 0.01
    others = [p for p in range(len(layer.kv_cache)) if p not in layer.sequences[0].pages[:complete].tolist()]
    assert bool(layer.kv_cache[others, :, page:].isnan().all()), "an incomplete page was given statistics"


def test_engines_of_one_seed_stamp_differently() -> None:
    """Where pages travel, a stamp must say which engine wrote the page."""
    stamps = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = Layer(Shape(SplaParameters(16, 16, 4, residual="none"), 1, 1, 32, False, 1.0, 0), [16])
        layer.write((0, 0, 16))
        stamps.append(layer.kv_cache[layer.sequences[0].pages[0], 0].view(torch.int32).flatten()[-4:])
    assert not torch.equal(stamps[0][:2], stamps[1][:2])
    assert torch.equal(stamps[0][2:], stamps[1][2:])


@both
@settings(PROFILE, max_examples=150)
@given(data=st.data())
def test_decode(implementation: type[VectorisedAttention], data: st.DataObject) -> None:
    """One query token on a context that somebody else wrote: the state is folded from nothing."""
    shape = data.draw(shapes(implementation=implementation))
    length = data.draw(lengths(shape.params), label="length")
    layer = Layer(shape, [length])
    layer.write((0, 0, length))
    (got,) = layer.forward([(0, length - 1, length)])
    compare(layer, 0, length - 1, got, [length - 1])


@both
@settings(PROFILE, max_examples=100)
@given(data=st.data())
def test_prefill(implementation: type[VectorisedAttention], data: st.DataObject) -> None:
    """A chunk of query tokens, from the start of the sequence or on an older context."""
    shape = data.draw(shapes(max_page=64, implementation=implementation))
    length = data.draw(lengths(shape.params), label="length")
    start = data.draw(st.one_of(st.just(0), st.integers(0, length - 1)), label="start")
    layer = Layer(shape, [length])
    layer.write((0, 0, length))
    (got,) = layer.forward([(0, start, length)])
    compare(layer, 0, start, got, sample_positions(start, length, shape.params))


@both
@settings(PROFILE, max_examples=70)
@given(data=st.data())
def test_batch(implementation: type[VectorisedAttention], data: st.DataObject) -> None:
    """Decode, prefill, short and padded rows in any order."""
    shape = data.draw(shapes(max_page=48, implementation=implementation))
    seq_lens = data.draw(st.lists(lengths(shape.params), min_size=2, max_size=4), label="lengths")
    rows: list[tuple[int, int, int] | None] = []
    for i, length in enumerate(seq_lens):
        query_len = data.draw(st.one_of(st.just(1), st.integers(1, length)), label=f"query length {i}")
        rows.append((i, length - query_len, length))
    rows = data.draw(st.permutations([*rows, None]), label="rows")
    layer = Layer(shape, seq_lens)
    for i, length in enumerate(seq_lens):
        layer.write((i, 0, length))
    outputs = layer.forward(rows)
    for row, got in zip(rows, outputs, strict=True):
        if row is not None:
            index, start, end = row
            compare(layer, index, start, got, sample_positions(start, end, shape.params, count=2))


@both
@settings(PROFILE, max_examples=60)
@given(data=st.data())
def test_any_steps_give_the_same_answer(implementation: type[VectorisedAttention], data: st.DataObject) -> None:
    """A sequence in random steps over one state: chunks, single tokens, preemption, and tokens that are taken back."""
    shape = data.draw(shapes(max_page=48, implementation=implementation))
    length = data.draw(lengths(shape.params), label="length")
    layer = Layer(shape, [length])
    position = 0
    while position < length:
        size = data.draw(st.sampled_from([1, 2, shape.params.page_size, 200]), label="step")
        end = min(length, position + size)
        if data.draw(st.sampled_from([False] * 4 + [True]), label="preempted"):
            garbage = layer.normal(*layer.state_cache[:, :, 0].shape)
            layer.state_cache[:, :, 0] = garbage  # another request's bytes where the headers were
        draft = min(length, end + data.draw(st.sampled_from([0, 0, 3]), label="rejected draft"))
        if draft > end:  # written, attended to, rejected, overwritten by what follows
            kept = layer.sequences[0].k[end:draft].clone()
            layer.sequences[0].k[end:draft] += 1.0
            layer.write((0, position, draft))
            layer.forward([(0, position, draft)])
            layer.sequences[0].k[end:draft] = kept
        layer.write((0, position, end))
        (got,) = layer.forward([(0, position, end)])
        if end == length or end % (3 * shape.params.page_size) < 2:
            compare(layer, 0, position, got, sample_positions(position, end, shape.params, count=1))
        position = end


@both
def test_drafts_select_where_prompts_are_dense(implementation: type[VectorisedAttention]) -> None:
    """Rows of unequal numbers of drafts are computed as their tokens one by one, whatever prompts are."""
    params = SplaParameters(16, 16, budget_blocks=3)
    layer = Layer(Shape(params, 2, 2, 64, False, 1.0, seed=4, implementation=implementation), [150, 98, 3, 120])
    layer.op.prefill_dense_below = 200
    layer.write(*((i, 0, len(sequence.k)) for i, sequence in enumerate(layer.sequences)))
    rows = [(0, 146, 150), (1, 93, 98), (2, 0, 3), (3, 80, 120)]
    outputs = layer.forward(rows, decode_query_len=5)
    for (index, start, end), got in zip(rows[:3], outputs, strict=False):
        compare(layer, index, start, got, range(start, end))
    assert relative_error(outputs[3][39], layer.reference(3, 119).output) > 0.01


@pytest.mark.parametrize("residual", ["regression", "linear"])
def test_a_state_of_another_request_is_not_trusted(residual: str) -> None:
    """A request is given the pages and the state blocks of one that has gone, which were valid until then."""
    params = SplaParameters(16, 16, budget_blocks=3, residual=residual)
    layer = Layer(Shape(params, 2, 2, 64, False, 1.0, seed=2), [100, 100])
    first, second = layer.sequences
    second.state = first.state
    layer.write((0, 0, 100), (1, 0, 100))  # in one step: only their ids tell the last pages apart
    layer.forward([(0, 99, 100)])
    (got,) = layer.forward([(1, 99, 100)])  # other pages, the same state
    compare(layer, 1, 99, got, [99])
    first.pages = second.pages
    layer.write((0, 0, 100))
    (got,) = layer.forward([(0, 99, 100)])  # the same pages with other content, the same state
    compare(layer, 0, 99, got, [99])


@pytest.mark.parametrize("residual", ["regression", "linear"])
def test_steady_state_reads_the_state(residual: str) -> None:
    """What a trusted state covers is not read again: the state alone remembers it."""
    params = SplaParameters(16, 16, budget_blocks=3, residual=residual)
    layer = Layer(Shape(params, 2, 2, 64, False, 1.0, seed=3), [120])
    sequence = layer.sequences[0]
    layer.write((0, 0, 100))
    layer.forward([(0, 99, 100)])
    for position in range(100, 120):
        layer.write((0, position, position + 1))
        want = layer.reference(0, position)
        unselected = [page for page in range(6) if all(page not in blocks for blocks in want.selected)]
        assert len(unselected) > 0
        held = layer.kv_cache[sequence.pages[unselected], :, :16].clone()
        layer.kv_cache[sequence.pages[unselected], :, :16] = math.nan
        (got,) = layer.forward([(0, position, position + 1)])
        layer.kv_cache[sequence.pages[unselected], :, :16] = held
        assert relative_error(got[0], want.output) < TOLERANCE, f"position {position}"


@both
@pytest.mark.parametrize("source", FINE_SOURCES)
def test_two_levels_read_no_more_than_they_need(source: str, implementation: type[VectorisedAttention]) -> None:
    """With a state that covers everything: keys of candidates, values of what is selected, statistics. With a sketch
    that of candidates, and keys of what is selected."""
    params = SplaParameters(16, 16, budget_blocks=4, fine_block=8, fine_source=source)
    layer = Layer(Shape(params, 2, 2, 64, False, 1.0, seed=5, implementation=implementation), [260])
    sequence = layer.sequences[0]
    layer.write((0, 0, 200))
    layer.forward([(0, 199, 200)])
    for position in range(200, 260):
        layer.write((0, position, position + 1))
        want = layer.reference(0, position, layer.stored_statistics(0, position // 16))
        held = layer.kv_cache.clone()
        for g in range(2):
            candidates = ref.select_blocks(want.group_scores[g], position, coarse_parameters(params))
            keys = set(ref.tokens_of(candidates, position + 1, 16))
            values = set(ref.tokens_of(want.selected[g], position + 1, 8))
            assert len(values) <= 64 and len(keys) <= 128
            if params.has_sketch:
                keys = values
                beyond = sequence.pages[[i for i in range(position // 16) if i not in candidates]]
                for page in beyond:
                    codes, scales = layer.op.page_layout.sketch(layer.op.page_layout.area(layer.kv_cache[page, g]))
                    codes[:], scales[:] = 255, math.nan
            for t in range((position // 16 - 1) * 16):  # a page that this step completes is read for the state
                page, row = sequence.pages[t // 16], t % 16
                if t not in keys:
                    layer.kv_cache[page, g, row, :64] = math.nan
                if t not in values:
                    layer.kv_cache[page, g, row, 64:] = math.nan
        (got,) = layer.forward([(0, position, position + 1)])
        layer.kv_cache.copy_(held)
        assert relative_error(got[0], want.output) < TOLERANCE, f"position {position}"
        assert layer.op.tokens_read is not None and (layer.op.tokens_read == 64).all()


@pytest.mark.parametrize("residual", ["regression", "linear"])
def test_a_long_rebuild(residual: str) -> None:
    """More pages than one pass of the fold takes."""
    params = SplaParameters(16, 16, budget_blocks=4, residual=residual)
    layer = Layer(Shape(params, 1, 2, 64, False, 1.0, seed=4), [16 * 130 + 5])
    layer.write((0, 0, 16 * 130 + 5))
    for end in (16 * 64 + 1, 16 * 65 + 1, 16 * 130 + 5):
        layer.state_cache.fill_(math.nan)
        (got,) = layer.forward([(0, end - 1, end)])
        compare(layer, 0, end - 1, got, [end - 1])


@pytest.mark.parametrize("combine", ["shared_normalizer", "double_rmsnorm", "sinks"])
@pytest.mark.parametrize("start", [0, 70, 97])
def test_every_position_of_a_prefill(start: int, combine: str) -> None:
    sinks = torch.float32 if combine == "sinks" else None
    params = SplaParameters(32, 16, budget_blocks=5, combine="shared_normalizer" if sinks else combine)
    layer = Layer(Shape(params, 2, 2, 64, False, 1.0, seed=1, sinks=sinks), [170])
    layer.write((0, 0, 170))
    sequence = layer.sequences[0]
    (got,) = layer.forward([(0, start, 170)])
    want = ref.spla_sequence(
        sequence.q.double() * layer.scale,
        sequence.k.double(),
        sequence.v.double(),
        params,
        start=start,
        gain=layer.gain.double(),
        norm_weights=(layer.norm_weights[0].double(), layer.norm_weights[1].double()),
        sinks=layer.sinks,
    )
    for position in range(start, 170):
        error = relative_error(got[position - start], want[position])
        assert error < TOLERANCE, f"position {position}"


@both
@settings(PROFILE, max_examples=60)
@given(data=st.data())
def test_decode_with_a_bfloat16_cache(implementation: type[VectorisedAttention], data: st.DataObject) -> None:
    """On what the cache holds, keys and statistics rounded, decode is as exact as with a float32 cache."""
    shape = data.draw(shapes(implementation=implementation))
    length = data.draw(lengths(shape.params), label="length")
    layer = Layer(shape, [length], dtype=torch.bfloat16)
    layer.write((0, 0, length))
    (got,) = layer.forward([(0, length - 1, length)])
    stored = layer.stored_statistics(0, (length - 1) // shape.params.page_size)
    want = layer.reference(0, length - 1, stored)
    if near_tie(want, length - 1, shape.params):
        Ties.dropped += 1
        assume(False)
    Ties.compared += 1
    error = relative_error(got[0], want.output)
    assert error < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [80, 128])
def test_prompts_with_a_cache_of_16_bits(head_size: int, dtype: torch.dtype) -> None:
    """The kernel rounds weights of tokens to 16 bits, which averages out; queries, which does not, it takes as they
    are, though the softmax scale of these heads is no power of two."""
    params = SplaParameters(page_size=32, selection_block=32, budget_blocks=4, residual="linear")
    layer = Layer(Shape(params, 2, 2, head_size, False, 2.0, 0), [300], dtype=dtype)
    layer.write((0, 0, 300))
    (got,) = layer.forward([(0, 0, 300)])
    errors = []
    for position in range(params.whole_tokens, 300, 7):
        want = layer.reference(0, position, layer.stored_statistics(0, position // params.page_size))
        if not near_tie(want, position, params):
            errors.append(relative_error(got[position], want.output))
    assert len(errors) > 10
    assert max(errors) < torch.finfo(dtype).eps / 2, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_code_reads_every_number(dtype: torch.dtype) -> None:
    """All bit patterns of the small dtypes, subnormal numbers, infinities and NaN among them."""
    cache = FlatCache.of(torch.arange(1 << 16).to(torch.uint16).view(dtype).view(1, 1, 256, 256))
    got = torch.empty(1 << 16)
    compiled.load_elements(cache.elements, 0, got.numpy())
    torch.testing.assert_close(got, cache.tensor.flatten().float(), rtol=0, atol=0, equal_nan=True)


def small_float(byte: int, mantissa_bits: int, bias: int) -> float:
    """The number that a byte stands for, by the definition of such formats (OCP 8-bit floating point, 1.0)."""
    exponent, mantissa = divmod(byte & 0x7F, 1 << mantissa_bits)
    fraction = mantissa / (1 << mantissa_bits)
    size = (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
    return -size if byte & 0x80 else size


@pytest.mark.parametrize(
    ("kind", "mantissa_bits", "bias", "largest", "load"),
    [(E4M3, 3, 7, 448.0, compiled.load_e4m3), (E5M2, 2, 15, 57344.0, compiled.load_e5m2)],
)
def test_numbers_of_a_byte(kind: str, mantissa_bits: int, bias: int, largest: float, load: Any) -> None:
    """All finite ones are read as they are defined, and what lies between and beyond goes to the nearest."""
    sizes = [small_float(byte, mantissa_bits, bias) for byte in range(128)]
    count = sizes.index(largest) + 1
    stored = torch.tensor([*range(count), *range(128, 128 + count)], dtype=torch.uint8)
    numbers = torch.tensor([*sizes[:count], *[-size for size in sizes[:count]]])
    assert torch.equal(decode(stored, ((kind, 2 * count),)), numbers)
    got = torch.empty(2 * count)
    load(stored.numpy(), got.numpy())
    assert torch.equal(got, numbers)

    magnitude = torch.empty(2000, dtype=torch.float64).uniform_(-bias - mantissa_bits, math.log2(largest) + 2).exp2()
    middle = (numbers[1:count] + numbers[: count - 1]) / 2  # ties
    x = torch.cat([magnitude.float(), numbers[:count], middle, torch.tensor([math.inf])])
    distances = (x.double()[:, None].clamp(max=largest) - numbers[:count].double()).abs()
    nearest = ((distances == distances.amin(-1, keepdim=True)) * (2 - torch.arange(count) % 2)).argmax(
        -1
    )  # even at a tie
    assert torch.equal(encode(x[:, None], ((kind, 1),))[:, 0].long(), nearest)
    assert torch.equal(encode(-x[:, None], ((kind, 1),))[:, 0].long(), nearest + 128)


def test_counts_of_a_byte() -> None:
    counts = torch.tensor([[0.0, 16.0, 255.0]])
    assert torch.equal(decode(encode(counts, ((COUNT, 3),)), ((COUNT, 3),)), counts)


def test_every_byte_has_a_format() -> None:
    for name in ref.SELECTORS:
        formats = get_selector(name).formats(80)
        assert formats is not None and sum(size for _, size in formats) == get_selector(name).width(80)


@pytest.mark.parametrize("name", ref.FEATURE_MAPS)
def test_feature_weights(name: str) -> None:
    """Sums over tokens one by one, two kv heads of two rows, in float64; what is read of whole blocks is the same."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, n, 8, generator=generator, dtype=torch.float64) for n in (3, 12, 12))
    weight = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
    params = SplaParameters(16, 16, 4, residual="linear", feature_map=name)
    residual = make_residual(params, 8, weight)
    assert residual is not None
    expected = torch.zeros(4, 3, 8, dtype=torch.float64)
    for row, query, token in itertools.product(range(4), range(3), range(12)):
        phi_q, phi_k = (ref.apply_feature_map(name, x @ weight[row % 2]) for x in (q[row, query], k[row, token]))
        expected[row, query] += (phi_q @ phi_k) * v[row, token]
    everything = torch.ones(4, 3, 12, dtype=torch.bool)
    torch.testing.assert_close(residual.read_tokens(q, k, v, everything)[0], expected)
    blocks = residual.read_blocks(q, k.unflatten(1, (3, 4)), v.unflatten(1, (3, 4)), everything[..., :3])
    torch.testing.assert_close(blocks[0], expected)
    s, z = residual.contribution(k, v)
    torch.testing.assert_close(residual.read(q, s, z.unsqueeze(-1))[0], expected)
