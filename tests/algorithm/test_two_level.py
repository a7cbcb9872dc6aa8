"""Selection in two levels: the definition against brute force, and the differentiable form against the definition.

Random numbers without drift: every block holds some of the mass, so that candidates leave something out.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spla_backend.algorithm import reference as ref
from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.selectors import get_selector
from spla_backend.algorithm.sequence import spla_attention, unselected_blocks
from spla_backend.algorithm.sketch import FINE_SOURCES

from .cases import random_qkv, stored_statistics

torch.set_num_threads(1)

BASE = SplaParameters(page_size=16, selection_block=16, budget_blocks=4, fine_block=4)


def candidates_of(result: ref.TokenResult, g: int, position: int, params: SplaParameters) -> list[int]:
    """What one level selects with the candidates for its budget."""
    coarse = replace(params, budget_blocks=params.candidate_blocks, fine_block=0, top_p=None)
    return ref.select_blocks(result.group_scores[g], position, coarse)


def test_the_best_fine_blocks_of_the_candidates() -> None:
    """By sums of exponentials in numpy, normalised over all fine blocks of candidates in complete pages."""
    q, k, v = random_qkv(215, 4, 2, 8)
    got = ref.spla_token(q[-1], k, v, BASE)  # current page 13: tokens 208 to 214 in the fine blocks 52 and 53
    for g in (0, 1):
        candidates = candidates_of(got, g, 214, BASE)
        assert len(candidates) == 8 and {0, 12, 13} <= set(candidates)
        fine = [f for block in candidates if block < 13 for f in range(4 * block, 4 * block + 4)]
        mass = np.array([np.exp((k[4 * f : 4 * f + 4, g] @ q[-1, 2 * g : 2 * g + 2].T).numpy()).sum(0) for f in fine])
        score = (mass / mass.sum(0)).sum(1)
        forced = {0, 1, 2, 3, 48, 49, 50, 51, 52, 53}
        free = sorted((f for f in fine if f not in forced), key=lambda f: -score[fine.index(f)])
        assert got.selected[g] == sorted(forced | set(free[:6]))  # a budget of 16 fine blocks
    assert got.selected[0] != got.selected[1]


def test_the_best_fine_blocks_by_the_sketch() -> None:
    """As if the keys of complete pages were what the sketch says; attended to are the keys themselves."""
    q, k, v = random_qkv(215, 4, 2, 40, seed=3)
    params = replace(BASE, fine_source="int4")
    got = ref.spla_token(q[-1], k, v, params)
    statistics = ref.complete_statistics(k, params)
    sketched = k.clone()
    for i in range(13):
        for g in (0, 1):
            sketched[16 * i : 16 * i + 16, g] = ref.sketched_keys(k[16 * i : 16 * i + 16, g], statistics[i, g, :40])
    want = ref.spla_token(q[-1], sketched, v, BASE, statistics=statistics)
    assert got.selected == want.selected and got.fine_scores == want.fine_scores
    assert got.selected != ref.spla_token(q[-1], k, v, BASE).selected
    tokens = ref.tokens_of(got.selected[0], 215, 4)
    assert torch.equal(got.exact[0], ref.exact_attention(q[-1, 0], k[tokens, 0], v[tokens, 0])[0])
    with pytest.raises(ValueError, match="'quest' has no mean for a sketch"):
        ref.spla_token(q[-1], k, v, replace(params, selector="quest", residual="none"))
    with pytest.raises(ValueError, match="unknown fine_source 'int8'"):
        ref.spla_token(q[-1], k, v, replace(params, fine_source="int8"))


def test_forced_tokens_are_those_of_one_level() -> None:
    q, k, v = random_qkv(400, 2, 1, 8)
    params = replace(BASE, page_size=32, budget_blocks=6)
    for length in (200, 208, 209, 224, 225, 256, 257, 400):
        fine = ref.spla_token(q[length - 1], k[:length], v[:length], params).selected[0]
        assert len(fine) == 24
        forced = ref.forced_blocks(length - 1, params)
        assert set(ref.tokens_of(forced, length, 16)) <= set(ref.tokens_of(fine, length, 4))


def test_keys_beyond_the_candidates_do_not_count() -> None:
    """Nor do values that are not selected, nor, where everything is a candidate, statistics."""
    q, k, v = random_qkv(300, 2, 1, 8)
    params = replace(BASE, residual="none")
    want = ref.spla_token(q[-1], k, v, params)
    candidates = candidates_of(want, 0, 299, params)
    assert len(candidates) == 8
    statistics = ref.complete_statistics(k, params)
    k_poisoned, v_poisoned = torch.full_like(k, math.nan), torch.full_like(v, math.nan)
    tokens = ref.tokens_of(candidates, 300, 16)
    k_poisoned[tokens] = k[tokens]
    tokens = ref.tokens_of(want.selected[0], 300, 4)
    v_poisoned[tokens] = v[tokens]
    got = ref.spla_token(q[-1], k_poisoned, v_poisoned, params, statistics=statistics)
    assert got.selected == want.selected and torch.equal(got.output, want.output)

    params = replace(params, least_candidates=20)  # 300 tokens are 19 blocks
    want = ref.spla_token(q[-1], k, v, params)
    got = ref.spla_token(q[-1], k, v, params, statistics=torch.randn_like(statistics))
    assert got.selected == want.selected and len(want.selected[0]) == 16


@pytest.mark.parametrize("residual", ["regression", "linear"])
def test_mass_of_the_tail(residual: str) -> None:
    """A selection block has the share of its mass that its tokens of the rest are of its tokens."""
    q, k, v = random_qkv(215, 4, 2, 8)
    params = replace(BASE, residual=residual)
    got = ref.spla_token(q[-1], k, v, params)
    statistics, shares = ref.complete_statistics(k, params), set()
    for h in range(4):
        mass = 0.0
        for i in range(13):
            share = sum(f not in got.selected[h // 2] for f in range(4 * i, 4 * i + 4)) / 4
            mass += share * math.exp(ref.mass_score("rem", q[-1, h], statistics[i, h // 2], 16))
            shares.add(share)
        assert math.isclose(float(got.log_tail_mass[h]), math.log(mass), rel_tol=1e-12)
    assert {0.0, 1.0} < shares


def test_edges() -> None:
    """Dense up to two budgets, the best of everything up to the candidates."""
    q, k, v = random_qkv(200, 2, 1, 8)
    params = replace(BASE, least_candidates=12)
    for length in (1, 4, 5, 16, 17, 63, 64, 65, 127, 128):
        got = ref.spla_token(q[length - 1], k[:length], v[:length], replace(params, top_p=0.5))
        assert got.selected == [list(range((length + 3) // 4))]
        assert torch.equal(got.output, got.exact)
    for length in (129, 132, 133, 191, 192, 193, 200):
        got = ref.spla_token(q[length - 1], k[:length], v[:length], params)
        assert len(got.selected[0]) == 16
        assert (len(candidates_of(got, 0, length - 1, params)) == (length + 15) // 16) == (length <= 192)


def test_top_p_is_a_share_of_the_candidates() -> None:
    q, k, v = random_qkv(300, 2, 1, 8)
    params = replace(BASE, budget_blocks=8)
    whole = ref.spla_token(q[-1], k, v, params)
    fine = [f for block in candidates_of(whole, 0, 299, params) if block < 18 for f in range(4 * block, 4 * block + 4)]
    masses = torch.stack([(k[4 * f : 4 * f + 4, 0] @ q[-1].T).exp().sum(0) for f in fine])  # [fine, heads]
    share = dict(zip(fine, (masses / masses.sum(0)).sum(1).tolist(), strict=True))
    counts = []
    for top_p in (0.1, 0.5, 0.6, 0.7, 1.0):
        selected = ref.spla_token(q[-1], k, v, replace(params, top_p=top_p)).selected[0]
        assert set(selected) <= set(whole.selected[0])
        covered = sum(share[f] for f in selected if f in share)
        forced = ref.forced_blocks(299, params)
        free = [f for f in selected if f // 4 not in forced]
        if len(selected) < 32:
            assert covered >= 2 * top_p
        if free:
            assert covered - min(share[f] for f in free) < 2 * top_p
        counts.append(len(selected))
    assert counts == sorted(counts) and len(set(counts)) > 2 and counts[-1] == 32


@st.composite
def cases(draw: st.DrawFn) -> tuple[SplaParameters, int, int, int]:
    """Parameters, kv heads, heads a kv head, and a length about some edge."""
    fine = draw(st.sampled_from([1, 2, 4]), label="fine")
    block = fine * draw(st.sampled_from([1, 2, 4]), label="per block")
    page = block * draw(st.sampled_from([1, 2]), label="per page")
    selector = draw(st.sampled_from(ref.SELECTORS))
    first, last = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    budget = first + max(last, page // block) + draw(st.integers(0, 3), label="free")
    residuals = ["regression", "linear", "none"] if get_selector(selector).has_mass else ["none"]
    residual = draw(st.sampled_from(residuals))
    params = SplaParameters(
        page,
        block,
        budget,
        first,
        last,
        selector,
        fine_block=fine,
        least_candidates=budget * draw(st.integers(0, 4)),
        fine_source=draw(st.sampled_from(FINE_SOURCES if get_selector(selector).mean_first else ["keys"])),
        statistics_dtype=draw(st.sampled_from(["auto", "fp8"])),
        top_p=draw(st.sampled_from([None, None, 0.3, 0.8])),
        residual=residual,
    )
    edge = draw(st.sampled_from([page, params.whole_tokens, params.candidate_blocks * params.selection_block]))
    length = edge * draw(st.integers(1, 2)) + draw(st.sampled_from([-fine - 1, -fine, -1, 0, 1, fine, fine + 1, page]))
    return params, draw(st.integers(1, 2)), draw(st.integers(1, 3)), max(1, length)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), seed=st.integers(0, 1000))
def test_sequence_is_the_definition(case: tuple[SplaParameters, int, int, int], seed: int) -> None:
    params, kv_heads, group, length = case
    q, k, v = random_qkv(length, kv_heads * group, kv_heads, 8, seed)
    k = 2 * k + 0.5
    statistics = stored_statistics(k, params)
    whole = [x.transpose(0, 1)[None] for x in (q, k, v)]
    some = min(length, 2 * params.page_size + 3)
    got = spla_attention(whole[0][:, :, -some:], *whole[1:], params, chunk=7)[0].transpose(0, 1)
    for i, position in enumerate(range(length - some, length)):
        known = statistics[: position // params.page_size * params.blocks_per_page]
        end = position + 1
        want = ref.spla_token(q[position], k[:end], v[:end], params, statistics=known).output
        torch.testing.assert_close(got[i], want, rtol=1e-9, atol=1e-10)


def test_as_many_fine_blocks_as_the_budget_has_room_for() -> None:
    """Whatever the scores are: lists of one length need no plan of their own in each layer."""
    for seed in range(20):
        q, k, _ = random_qkv(160, 2, 1, 8, seed)
        q *= 1e4  # nearly all of the candidates have no mass that a float32 could tell from none
        params = replace(BASE, page_size=32)
        keys = k.transpose(0, 1).float()
        statistics = get_selector("rem").statistics(keys.unflatten(1, (-1, 16)))
        positions = torch.arange(160)
        rest = unselected_blocks(q.transpose(0, 1)[None].float(), keys, statistics, positions, params)  # [1, 160, 40]
        complete = positions // 32 * 8
        selected = positions // 4 + 1 - rest[0].sum(-1)
        assert torch.equal(selected, torch.where(positions < 128, positions // 4 + 1, 16))
        assert not bool((rest[0] & (torch.arange(40) >= complete[:, None])).any())
