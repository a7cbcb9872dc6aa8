"""Tiles that share a selection: the definition against brute force, and the sequence form against the definition."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spla_backend.algorithm import reference as ref
from spla_backend.algorithm import sequence
from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.selectors import block_statistics, get_selector
from spla_backend.algorithm.sequence import spla_attention
from spla_backend.algorithm.tiles import Tiles, attend_selected, prefix_states
from spla_backend.algorithm.two_level import FINE_DTYPES, round_keys, round_queries
from spla_backend.kernels import dispatch
from spla_backend.kernels.interface import Layer, Limits

from .cases import random_qkv, stored_statistics

torch.set_num_threads(1)

BASE = SplaParameters(page_size=16, selection_block=16, budget_blocks=4, fine_block=4, least_candidates=8, tile=8)
SHARED = SplaParameters(
    page_size=32,
    selection_block=8,
    budget_blocks=6,
    last_blocks=3,
    selector="mean",
    fine_block=4,
    tile=8,
    tile_step=4,
    candidate_tile=16,
    residual="none",
)
"""Tiles that share their candidates, which are 12 blocks."""


def by_sequence(q: Tensor, k: Tensor, v: Tensor, params: SplaParameters, start: int = 0, **kwargs: object) -> Tensor:
    """The sequence form's output from position `start` on `[L - start, H, d]`, of tensors as the reference has them."""
    heads = [x.transpose(0, 1)[None] for x in (q[start:], k, v)]
    return spla_attention(*heads, params, **kwargs)[0].transpose(0, 1)


def test_the_best_of_a_tile_by_brute_force() -> None:
    """Sums of exponentials in numpy: each head's share of the mass, over heads and tokens."""
    q, k, v = random_qkv(215, 4, 2, 8)
    one_level = replace(BASE, fine_block=0, selector="mean")
    for position in (208, 211, 214):  # the tile 208 to 215, whose last token is not there
        kwargs = {"tile_queries": q[208:215]}
        one = ref.spla_token(q[position], k[: position + 1], v[: position + 1], one_level, **kwargs)
        two = ref.spla_token(q[position], k[: position + 1], v[: position + 1], BASE, **kwargs)
        for g in (0, 1):
            queries = q[208:215, 2 * g : 2 * g + 2].flatten(0, 1).numpy()
            means = k[:208, g].unflatten(0, (13, 16)).mean(1).numpy()
            mass = np.exp(means @ queries.T)  # [13, tokens * heads]
            score = (mass / mass.sum(0)).sum(1)
            best = sorted(range(1, 12), key=lambda i: -score[i])[:1]
            assert one.selected[g] == sorted({0, 12, 13, *best})

            coarse = replace(BASE, fine_block=0, budget_blocks=8)
            candidates = [i for i in ref.select_blocks(two.group_scores[g], position, coarse) if i < 13]
            fine = [f for i in candidates for f in range(4 * i, 4 * i + 4)]
            mass = np.array([np.exp(k[4 * f : 4 * f + 4, g].numpy() @ queries.T).sum(0) for f in fine])
            score = (mass / mass.sum(0)).sum(1)
            forced = {0, 1, 2, 3, 48, 49, 50, 51, 52, 53}  # 208 to 215 are the fine blocks 52 and 53
            free = sorted((f for f in fine if f not in forced), key=lambda f: -score[fine.index(f)])
            assert two.selected[g] == sorted(forced | set(free[:6]))


def test_a_token_sees_nothing_behind_it() -> None:
    """Nor does what lies behind it in its tile count, but for the queries."""
    q, k, v = random_qkv(216, 2, 1, 8)
    want = ref.spla_sequence(q, k, v, BASE, start=208)
    got = by_sequence(q, k, v, BASE, 208)
    torch.testing.assert_close(got, want[208:], rtol=1e-9, atol=1e-10)
    for behind in range(209, 216):
        k_other, v_other = k.clone(), v.clone()
        k_other[behind:], v_other[behind:] = torch.randn(2, 216 - behind, 1, 8, dtype=torch.float64)
        assert torch.equal(ref.spla_sequence(q, k_other, v_other, BASE, start=208)[208:behind], want[208:behind])
        torch.testing.assert_close(by_sequence(q, k_other, v_other, BASE, 208)[: behind - 208], got[: behind - 208])


def test_forced_blocks_are_those_of_all_tokens() -> None:
    params = replace(BASE, page_size=32, selection_block=4, fine_block=0, budget_blocks=20, last_blocks=3, tile=16)
    for position in range(200, 264):
        tile = ref.tile_of(position, params)
        alone = [ref.forced_blocks(p, replace(params, tile=1)) for p in tile]
        assert ref.forced_blocks(position, params) == sorted(set().union(*alone))
        assert len(ref.forced_blocks(position, params)) <= params.max_forced_blocks
    most = {p: len(ref.forced_blocks(p, params)) for p in range(200, 264)}
    assert max(most.values()) == params.max_forced_blocks


def test_one_token_a_tile_is_selection_by_token() -> None:
    """By the code for tiles, over gathered tokens and states, against the masks."""
    q, k, v = random_qkv(230, 4, 2, 8)
    for params in (BASE, replace(BASE, fine_block=0), replace(BASE, residual="none"), replace(BASE, residual="linear")):
        alone = replace(params, tile=1)
        want = by_sequence(q, k, v, alone, 190)
        rows = [x.transpose(0, 1) for x in (k, v)]  # [2, 230, 8]
        queries = q[190:].transpose(0, 1).unflatten(0, (2, 2))  # [2, group, queries, 8]
        positions = torch.arange(190, 230)
        statistics = block_statistics(rows[0][:, :224].unflatten(1, (-1, 16)), alone)
        rest = sequence.unselected_blocks(queries, rows[0], statistics, positions, alone)
        residual = sequence.make_residual(alone, 8)
        states = None if residual is None else prefix_states(*rows, 16, residual)
        exact, lse, reading = attend_selected(queries, *rows, rest, positions, states, alone, residual)
        masked, masked_lse = sequence._attend_masked(queries, *rows, rest, positions, alone.attended_block)
        torch.testing.assert_close(exact, masked, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(lse, masked_lse, rtol=1e-9, atol=1e-10)
        if residual is None:
            torch.testing.assert_close(exact.flatten(0, 1).transpose(0, 1), want, rtol=1e-9, atol=1e-10)
            continue
        mask = rest.repeat_interleave(alone.attended_block, -1)[:, None].expand(-1, 2, -1, -1).flatten(1, 2)
        keys, values = (x[:, :224] for x in rows)
        for a, b in zip(reading, residual.read_tokens(queries.flatten(1, 2), keys, values, mask), strict=True):
            torch.testing.assert_close(a, b.expand_as(a), rtol=1e-8, atol=1e-8)
        tile = ref.spla_sequence(q, k, v, replace(params, tile=1), start=190)
        torch.testing.assert_close(want, tile[190:], rtol=1e-9, atol=1e-10)


def test_some_tokens_choose_for_all() -> None:
    """Queries that are not scored do not count, in either form, but for their own outputs."""
    q, k, v = random_qkv(232, 2, 1, 8, seed=2)
    params = replace(BASE, tile_step=4)
    want = by_sequence(q, k, v, params, 200)
    torch.testing.assert_close(want, ref.spla_sequence(q, k, v, params, start=200)[200:], rtol=1e-9, atol=1e-10)
    scored = [p - 200 for p in range(200, 232) if p % 4 == 3]
    other = q.clone()
    rest = [p for p in range(200, 232) if p % 4 != 3]
    other[rest] = torch.randn(len(rest), 2, 8, dtype=torch.float64)
    got = by_sequence(other, k, v, params, 200)
    torch.testing.assert_close(got[scored], want[scored], rtol=1e-9, atol=1e-10)
    every = by_sequence(q, k, v, replace(params, tile_step=1), 200)
    assert (every - want).abs().max() > 1e-3


@pytest.mark.parametrize("residual", ["regression", "none"])
def test_chunks(residual: str) -> None:
    """Cuts between tiles change nothing, in the reference not a bit; a cut within one changes that tile alone, whose
    pieces select by themselves."""
    q, k, v = random_qkv(240, 2, 1, 8, seed=1)
    params = replace(BASE, residual=residual)

    def in_chunks(cuts: list[int]) -> tuple[Tensor, Tensor]:
        """From position 160 on."""
        references, sequences = [], []
        for start, end in zip([160, *cuts], [*cuts, 240], strict=True):
            references.append(ref.spla_sequence(q[:end], k[:end], v[:end], params, start=start)[start:])
            sequences.append(by_sequence(q[:end], k[:end], v[:end], params, start))
        torch.testing.assert_close(torch.cat(sequences), torch.cat(references), rtol=1e-9, atol=1e-10)
        return torch.cat(references), torch.cat(sequences)

    want, got = in_chunks([])
    for cuts in ([168], [176, 200, 208], list(range(168, 240, 8))):
        again = in_chunks(cuts)
        assert torch.equal(again[0], want)
        torch.testing.assert_close(again[1], got, rtol=1e-9, atol=1e-10)
    for chunk in (1, 8, 20, 64):
        torch.testing.assert_close(by_sequence(q, k, v, params, 160, chunk=chunk), got, rtol=1e-9, atol=1e-10)
    changed = 0.0
    for cut in (173, 205, 233):
        again, _ = in_chunks([cut])
        inside = slice(cut // 8 * 8 - 160, cut // 8 * 8 - 152)
        changed = max(changed, float((again[inside] - want[inside]).abs().max()))
        again[inside] = want[inside]
        assert torch.equal(again, want)
    assert changed > 1e-3


def test_rest_and_state_are_the_tiles() -> None:
    """The tail has all complete pages of the tile that it did not select, and none of the current page."""
    q, k, v = random_qkv(224, 2, 1, 8)
    params = replace(BASE, tile=16)
    tails = []
    for position in (208, 215, 223):
        got = ref.spla_token(q[position], k[: position + 1], v[: position + 1], params, tile_queries=q[208:224])
        rest = [t for t in range(208) if t // 4 not in got.selected[0]]
        assert len(rest) == 208 - 4 * 12  # 16 fine blocks, of which 4 in the current page, whatever is there of it
        mean, kc = v[rest, 0].mean(0), k[rest, 0] - k[rest, 0].mean(0)
        for h in (0, 1):
            tail = mean + 0.5 * (q[position, h] @ kc.T @ v[rest, 0]) / len(rest)
            torch.testing.assert_close(got.tail[h], tail, rtol=1e-9, atol=1e-10)
            masses = ref.complete_statistics(k, params)[:, 0]
            mass = sum(
                sum(t // 16 == i for t in rest) / 16 * math.exp(ref.mass_score("rem", q[position, h], masses[i], 16))
                for i in range(13)
            )
            assert math.isclose(float(got.log_tail_mass[h]), math.log(mass), rel_tol=1e-9)
        tails.append(tuple(got.selected[0]))
    assert len(set(tails)) == 1


def test_shared_candidates_by_brute_force() -> None:
    """Sums of exponentials in numpy: candidates by the tokens of both tiles that are scored, fine blocks by the tile's.
    Of the tiles 224 to 231 and 232 to 239, tokens are there up to 238."""
    q, k, v = random_qkv(239, 4, 2, 8)
    means = k[:224].unflatten(0, (28, 8)).mean(1).numpy()  # [28, 2, 8]
    outputs = ref.spla_sequence(q, k, v, SHARED, start=224)
    for position, voters, forced in (
        (226, [227, 231], {0, 1, *range(52, 58)}),  # the blocks 26 and 27, and the current page up to 231
        (231, [227, 231], {0, 1, *range(52, 58)}),
        (238, [235], {0, 1, *range(54, 60)}),  # the block 27, and the current page up to 239
    ):
        assert ref.voters_of(position, range(224, 239), SHARED) == voters
        assert ref.candidate_voters_of(position, range(224, 239), SHARED) == [227, 231, 235]
        kwargs = {"tile_queries": q[voters], "candidate_queries": q[[227, 231, 235]]}
        got = ref.spla_token(q[position], k[: position + 1], v[: position + 1], SHARED, **kwargs)
        for g in (0, 1):
            of_group = q[:, 2 * g : 2 * g + 2]
            mass = np.exp(means[:, g] @ of_group[[227, 231, 235]].flatten(0, 1).numpy().T)  # [28, tokens * heads]
            score = (mass / mass.sum(0)).sum(1)
            # 0, 26 and 27 are forced, as the first token of both tiles has it, and 28 and 29 are in the current page.
            candidates = [0, 26, 27, *sorted(range(1, 26), key=lambda i: -score[i])[: 12 - 5]]
            fine = [f for i in candidates for f in (2 * i, 2 * i + 1)]
            keys = k[:, g].numpy()
            queries = of_group[voters].flatten(0, 1).numpy()
            mass = np.array([np.exp(keys[4 * f : 4 * f + 4] @ queries.T).sum(0) for f in fine])
            score = (mass / mass.sum(0)).sum(1)
            free = sorted((f for f in fine if f not in forced), key=lambda f: -score[fine.index(f)])
            assert got.selected[g] == sorted(forced | set(free[: 12 - len(forced)]))
        assert torch.equal(got.output, outputs[position])
    torch.testing.assert_close(by_sequence(q, k, v, SHARED, 224), outputs[224:], rtol=1e-9, atol=1e-10)


def test_what_is_no_shared_candidate_does_not_count() -> None:
    """Nor do, for the definition, values that a tile did not select."""
    q, k, v = random_qkv(240, 2, 1, 8, seed=3)
    statistics = ref.complete_statistics(k, SHARED)  # [28, 1, 8]
    candidates: set[int] = set()
    for first in (224, 232):
        of_tile = {"tile_queries": q[[first + 3, first + 7]], "candidate_queries": q[227:240:4]}
        for position in (first, first + 7):
            seen = slice(position + 1)
            want = ref.spla_token(q[position], k[seen], v[seen], SHARED, **of_tile)
            candidates = {f // 2 for f in want.fine_scores[0]}
            assert len(candidates) == 10
            k_poisoned, v_poisoned = torch.full_like(k, math.nan), torch.full_like(v, math.nan)
            tokens = ref.tokens_of([*candidates, 28, 29], position + 1, 8)
            k_poisoned[tokens] = k[tokens]
            tokens = ref.tokens_of(want.selected[0], position + 1, 4)
            v_poisoned[tokens] = v[tokens]
            poisoned = (k_poisoned[seen], v_poisoned[seen])
            got = ref.spla_token(q[position], *poisoned, SHARED, statistics=statistics, **of_tile)
            assert got.selected == want.selected and torch.equal(got.output, want.output)

    queries, keys = q[224:].transpose(0, 1)[None], k.transpose(0, 1)  # [1, group, 16, 8], [1, 240, 8]
    blocks, positions = statistics.transpose(0, 1), torch.arange(224, 240)
    want_rest = sequence.unselected_blocks(queries, keys, blocks, positions, SHARED)  # [1, 2, 56]
    poisoned_keys = keys.clone()
    poisoned_keys[:, ref.tokens_of([i for i in range(28) if i not in candidates], 240, 8)] = math.nan
    assert torch.equal(sequence.unselected_blocks(queries, poisoned_keys, blocks, positions, SHARED), want_rest)
    poisoned_keys[:, 26 * 8] = math.nan  # forced for both, of which the second tile need not select it
    assert not torch.equal(sequence.unselected_blocks(queries, poisoned_keys, blocks, positions, SHARED), want_rest)


@pytest.mark.parametrize("change", [{}, {"tile_step": 1}, {"tile": 1, "tile_step": 1}])
def test_candidates_of_one_tile_are_the_tiles(change: dict) -> None:
    """Bit for bit, and those of more are others."""
    q, k, v = random_qkv(250, 2, 1, 8)
    params = replace(SHARED, residual="regression", candidate_tile=0, **change)
    of_tile, of_more = (replace(params, candidate_tile=t) for t in (params.tile, 16))
    assert torch.equal(by_sequence(q, k, v, of_tile), by_sequence(q, k, v, params))
    want, got, other = (ref.spla_sequence(q, k, v, p, start=230)[230:] for p in (params, of_tile, of_more))
    assert torch.equal(got, want)
    torch.testing.assert_close(by_sequence(q, k, v, of_more, 230), other, rtol=1e-9, atol=1e-10)
    assert (other - want).abs().max() > 1e-3


def test_chunks_of_shared_candidates() -> None:
    """Cuts between candidate tiles change nothing, others that candidate tile alone, between tiles and within."""
    q, k, v = random_qkv(240, 2, 1, 8, seed=1)

    def in_chunks(*cuts: int) -> Tensor:
        """From position 192 on."""
        parts = []
        for start, end in zip([192, *cuts], [*cuts, 240], strict=True):
            want = ref.spla_sequence(q[:end], k[:end], v[:end], SHARED, start=start)[start:]
            got = by_sequence(q[:end], k[:end], v[:end], SHARED, start)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
            parts.append(want)
        return torch.cat(parts)

    want = in_chunks()
    assert torch.equal(in_chunks(208, 224), want)
    for chunk in (1, 8, 20, 64):
        got = by_sequence(q, k, v, SHARED, 192, chunk=chunk)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(by_sequence(q, k, v, SHARED, 203, chunk=chunk)[5:], want[16:], rtol=1e-9, atol=1e-10)
    for cut in (216, 229):
        again = in_chunks(cut)
        inside = slice(cut // 16 * 16 - 192, cut // 16 * 16 - 176)
        assert (again[inside] - want[inside]).abs().max() > 1e-3
        again[inside] = want[inside]
        assert torch.equal(again, want)


def test_a_dense_tile_may_share_candidates_with_others() -> None:
    """The candidate tile 64 to 95 has fewer candidates than blocks; the tiles up to 79 are within two budgets."""
    q, k, v = random_qkv(96, 2, 1, 8)
    params = replace(SHARED, budget_blocks=5, last_blocks=2, candidate_tile=32)
    assert params.whole_tokens == 80 and params.candidate_blocks == 10
    want = ref.spla_sequence(q, k, v, params, start=64)[64:]
    torch.testing.assert_close(by_sequence(q, k, v, params, 64), want, rtol=1e-9, atol=1e-10)
    dense = by_sequence(q, k, v, replace(params, budget_blocks=12), 64)
    torch.testing.assert_close(want[:16], dense[:16], rtol=1e-9, atol=1e-10)
    assert ((want[16:] - dense[16:]).abs().amax((1, 2)) > 1e-6).all()


@st.composite
def cases(draw: st.DrawFn) -> tuple[SplaParameters, int, int, int]:
    """Parameters, kv heads, heads a kv head, and a length about some edge."""
    block = draw(st.sampled_from([2, 4, 8]), label="block")
    page = block * draw(st.sampled_from([1, 2] if block == 8 else [1, 2, 4]), label="per page")
    tile = draw(st.sampled_from([t for t in (1, 2, 4, 8, 16) if t <= page]), label="tile")
    fine = draw(st.sampled_from([0, *(f for f in (1, 2, 4) if f <= block)]), label="fine")
    selector = draw(st.sampled_from(ref.SELECTORS))
    first, last = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    residuals = ["regression", "linear", "none"] if get_selector(selector).has_mass else ["none"]
    params = SplaParameters(
        page,
        block,
        1,
        first,
        last,
        selector,
        fine_block=fine,
        fine_source=draw(st.sampled_from(["keys", "int4"] if fine and get_selector(selector).mean_first else ["keys"])),
        fine_dtype=draw(st.sampled_from(FINE_DTYPES if fine else ["auto"])),
        tile=tile,
        tile_step=draw(st.sampled_from([n for n in (1, 2, 4) if n <= tile])),
        candidate_tile=draw(st.sampled_from([0, *(tile * n for n in (1, 2, 4) if tile * n <= page)] if fine else [0])),
        statistics_dtype=draw(st.sampled_from(["auto", "fp8"])),
        top_p=draw(st.sampled_from([None, None, 0.3, 0.8])),
        residual=draw(st.sampled_from(residuals)),
        combine="shared_normalizer",
    )
    budget = params.max_forced_blocks + draw(st.integers(0, 3), label="free")
    params = replace(params, budget_blocks=budget, least_candidates=budget * draw(st.integers(2, 3)))
    if params.residual == "linear" and draw(st.booleans()):
        params = replace(params, combine="double_rmsnorm")
    edge = draw(st.sampled_from([page, params.whole_tokens, params.least_candidates * block]))
    length = edge * draw(st.integers(1, 2)) + draw(st.sampled_from([-tile, -1, 0, 1, tile // 2, tile + 1, page]))
    return params, draw(st.integers(1, 2)), draw(st.integers(1, 3)), max(1, length)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), seed=st.integers(0, 1000), skipped=st.integers(0, 5), has_sinks=st.booleans())
def test_sequence_is_the_definition(
    case: tuple[SplaParameters, int, int, int], seed: int, skipped: int, has_sinks: bool
) -> None:
    params, kv_heads, group, length = case
    q, k, v = random_qkv(length, kv_heads * group, kv_heads, 8, seed)
    k = 2 * k + 0.5
    statistics = stored_statistics(k, params)
    start = max(0, length - 2 * params.page_size - skipped)  # within a tile, for the most part
    sinks = q[0, :, 0] if has_sinks and params.combine == "shared_normalizer" else None
    want = ref.spla_sequence(q, k, v, params, start=start, statistics=statistics, sinks=sinks)[start:]
    got = by_sequence(q, k, v, params, start, chunk=7, sinks=sinks)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_hopeless_blocks_are_selected_before_none() -> None:
    """As many blocks as the budget has room for, whatever the scores are."""
    for seed in range(10):
        q, k, _ = random_qkv(160, 2, 1, 8, seed)
        params = replace(BASE, page_size=32)
        keys = k.transpose(0, 1).float()
        statistics = get_selector("rem").statistics(keys.unflatten(1, (-1, 16)))
        queries = 1e4 * q.transpose(0, 1)[None].float()
        rest = sequence.unselected_blocks(queries, keys, statistics, torch.arange(160), params)  # [1, 20, 40]
        ends = torch.arange(7, 160, 8)
        selected = ends // 4 + 1 - rest[0].sum(-1)
        assert torch.equal(selected, torch.where(ends < 128, ends // 4 + 1, 16))


def test_tiles_cut_and_join() -> None:
    tiles = Tiles(torch.arange(13, 30), replace(BASE, tile=8))
    assert tiles.ends.tolist() == [15, 23, 31]
    x = torch.randn(2, 17, 3)
    cut = tiles.cut(x, 1)
    assert cut.shape == (2, 3, 8, 3) and torch.equal(tiles.join(cut, 1), x)
    assert torch.equal(cut[:, 1], x[:, 3:11]) and not cut[:, 0, :5].any() and not cut[:, 2, 6:].any()
    scores = torch.randn(17, 2, 5)
    shared = tiles.share(scores)
    torch.testing.assert_close(shared[0], scores[:3].exp().mean(0).log())
    torch.testing.assert_close(shared[2], scores[11:].exp().mean(0).log())
    assert torch.equal(tiles.by_token(shared)[[0, 3, 16]], shared[[0, 1, 2]])
    some = Tiles(torch.arange(13, 30), replace(BASE, tile=8, tile_step=4))
    assert (some.voters + 13).tolist() == [15, 19, 23, 27]
    torch.testing.assert_close(some.share(scores[some.voters])[1], scores[[6, 10]].exp().mean(0).log())
    pair = Tiles(torch.arange(13, 30), replace(BASE, tile=16), some.voters)
    assert pair.ends.tolist() == [15, 31] and pair.by_tile(pair.ends, some).tolist() == [15, 31, 31]
    torch.testing.assert_close(pair.share(scores[some.voters])[1], scores[[6, 10, 14]].exp().mean(0).log())
    piece = Tiles(torch.arange(12, 18), replace(BASE, tile=8, tile_step=8))
    assert (piece.voters + 12).tolist() == [15, 17]  # of 16 and 17 none is an eighth


def test_rounding_of_products() -> None:
    """Within half a step of the format; scaling a query by a power of two does not matter."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator, dtype=torch.float64) * torch.logspace(-3, 3, 200)[:, None]
    for dtype, bits in (("bf16", 8), ("fp8", 4)):
        params = replace(BASE, fine_dtype=dtype)
        got = round_queries(x, params)
        largest = x.abs().amax(-1, keepdim=True)
        assert ((got - x).abs() <= x.abs() * 2.0**-bits + (largest * 2.0**-17 if dtype == "fp8" else 0)).all()
        assert (got != x).any()
        torch.testing.assert_close(round_queries(x * 2.0**5, params), got * 2.0**5, rtol=0, atol=0)
        torch.testing.assert_close(ref.rounded_queries(x, dtype), got, rtol=0, atol=0)
        torch.testing.assert_close(ref.rounded_keys(x, dtype), round_keys(x, params), rtol=0, atol=0)
    in_fp8 = replace(BASE, fine_dtype="fp8")
    assert round_keys(torch.tensor([1e6, -1e6, 0.0]), in_fp8).tolist() == [448.0, -448.0, 0.0]
    assert not round_queries(torch.zeros(2, 8), in_fp8).any()
    for edge in (447.9, 448.0, 448.1, 1.75, 0.875, 0.876):
        q = torch.tensor([[edge, 0.1]], dtype=torch.float64)
        assert torch.equal(round_queries(q, in_fp8), ref.rounded_queries(q, "fp8"))


@pytest.mark.parametrize("change", [{"tile": 16}, {"candidate_tile": 16}, {"fine_dtype": "bf16"}])
def test_no_engine_computes_it_as_something_else(change: dict) -> None:
    params = SplaParameters(page_size=16, selection_block=16, budget_blocks=6, fine_block=8, **change)
    layer, limits = (
        Layer(2, 1, 64, torch.float32, 0.125),
        Limits(1, 1, 256, 64, prefill_dense_below=0, largest_budget=0),
    )
    with pytest.raises(ValueError, match="no kernel lets tiles of"):
        dispatch.make(torch.device("cpu"), params, layer, limits)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = random_qkv(64, 2, 1, 8)
    for params in (replace(BASE, tile=32), replace(BASE, page_size=48, tile=24)):
        with pytest.raises(ValueError, match="must divide page_size"):
            ref.spla_token(q[-1], k, v, params)
        with pytest.raises(ValueError, match="must divide page_size"):
            by_sequence(q, k, v, params)
    with pytest.raises(ValueError, match="tile_step 3 must divide tile 8"):
        by_sequence(q, k, v, replace(BASE, tile_step=3))
    for shared in (12, 24, 32):
        with pytest.raises(
            ValueError, match=f"candidate_tile {shared} must be a multiple of tile 8 and divide page_size"
        ):
            by_sequence(q, k, v, replace(BASE, candidate_tile=shared))
    with pytest.raises(ValueError, match="candidate_tile 16 must be 0 where there is one level"):
        ref.spla_token(q[-1], k, v, replace(BASE, fine_block=0, candidate_tile=16))
    with pytest.raises(ValueError, match=r"tile_queries \[1 to 8, H, d\] expected"):
        ref.spla_token(q[-1], k, v, BASE, tile_queries=q[-9:])
    with pytest.raises(ValueError, match=r"candidate_queries \[1 to 8, H, d\] expected"):
        ref.spla_token(q[-1], k, v, BASE, candidate_queries=q[-9:])
    with pytest.raises(ValueError, match="no gradients"):
        by_sequence(q.requires_grad_(), k, v, BASE)
    q = q.detach()
    with pytest.raises(ValueError, match="learned weights of features"):
        by_sequence(q, k, v, replace(BASE, residual="linear"), feature_weight=torch.eye(8, dtype=q.dtype)[None])
