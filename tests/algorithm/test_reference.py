"""The float64 reference against independent brute force: numpy, SDPA and sums over tokens instead of states."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spla_backend.algorithm import reference as ref
from spla_backend.algorithm.parameters import SplaParameters

torch.set_num_threads(1)

WITH_MASS = [selector for selector in ref.SELECTORS if selector != "quest"]
BASE = SplaParameters(page_size=16, selection_block=16, budget_blocks=4)


def random_qkv(length: int, heads: int, kv_heads: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q `[L, H, d]`, scaled, and k, v `[L, G, d]`; float64, pages of unlike means so that scores differ."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    drift = normal(length // 16 + 1, kv_heads, d).repeat_interleave(16, dim=0)[:length]
    return normal(length, heads, d) * 2 / d**0.5, normal(length, kv_heads, d) + drift, normal(length, kv_heads, d)


def dense_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention of one token: q `[H, d]`, k and v `[L, G, d]`."""
    out = F.scaled_dot_product_attention(
        q[None, :, None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=1.0, enable_gqa=True
    )
    return out[0, :, 0]


def rest_tokens(result: ref.TokenResult, kv_head: int, length: int, params: SplaParameters) -> list[int]:
    """Tokens of complete pages whose block was not selected."""
    complete = (length - 1) // params.page_size * params.page_size
    return [t for t in range(complete) if t // params.selection_block not in result.selected[kv_head]]


# Corners


@pytest.mark.parametrize("combine", ["shared_normalizer", "double_rmsnorm"])
@pytest.mark.parametrize(
    ("selector", "residual"),
    [(s, r) for s in ref.SELECTORS for r in ("regression", "linear", "none") if not (s == "quest" and r != "none")],
)
def test_budget_beyond_context_is_dense_attention(selector: str, residual: str, combine: str) -> None:
    params = replace(BASE, selector=selector, residual=residual, combine=combine, budget_blocks=5, top_p=0.5)
    q, k, v = random_qkv(80, 4, 2, 8)
    for length in (1, 2, 15, 16, 17, 32, 33, 79, 80):
        got = ref.spla_token(q[length - 1], k[:length], v[:length], params)
        want = dense_last(q[length - 1], k[:length], v[:length])
        assert got.selected == [list(range((length + 15) // 16))] * 2
        torch.testing.assert_close(got.exact, want, rtol=1e-12, atol=1e-14)
        assert torch.equal(got.tail, torch.zeros_like(got.tail)), "the residual must be zero, not small"
        assert bool((got.log_tail_mass == -math.inf).all())
        if combine == "shared_normalizer":
            assert torch.equal(got.output, got.exact)
        else:
            torch.testing.assert_close(got.output, F.rms_norm(want, [8], eps=1e-6), rtol=1e-12, atol=1e-14)


def test_one_block_beyond_the_budget_is_not_dense() -> None:
    params = replace(BASE, budget_blocks=5, residual="none")
    q, k, v = random_qkv(81, 4, 2, 8)
    got = ref.spla_token(q[80], k, v, params)
    assert [len(blocks) for blocks in got.selected] == [5, 5]
    assert not torch.allclose(got.output, dense_last(q[80], k, v), rtol=1e-6)


@pytest.mark.parametrize("residual", ["regression", "linear"])
@pytest.mark.parametrize("combine", ["shared_normalizer", "double_rmsnorm"])
@pytest.mark.parametrize("selector", WITH_MASS)
def test_only_forced_blocks_stays_finite(selector: str, combine: str, residual: str) -> None:
    params = replace(BASE, selector=selector, combine=combine, residual=residual, budget_blocks=2, last_blocks=1)
    q, k, v = random_qkv(150, 4, 2, 8)
    got = ref.spla_token(q[149] * 200, k, v, params)  # logits in the hundreds: exp of them overflows
    assert got.selected == [[0, 9], [0, 9]]
    assert bool(got.output.isfinite().all())
    assert float(got.tail.abs().max()) > 0


def test_identical_rest_is_dense_attention() -> None:
    """Where the keys of the rest are equal, its mass and its direction are exact: the residual restores all of it."""
    params = replace(BASE, budget_blocks=3)
    q, k, v = random_qkv(100, 4, 2, 8)
    k[16:80] = k[16]
    got = ref.spla_token(q[99], k, v, params)
    assert [len(blocks) for blocks in got.selected] == [3, 3]
    torch.testing.assert_close(got.output, dense_last(q[99], k, v), rtol=1e-11, atol=1e-13)
    assert not torch.allclose(got.exact, got.output, rtol=1e-3)


# Statistics and scores


def test_statistics_of_simple_keys() -> None:
    keys = torch.tensor([[1.0, -4.0], [3.0, 0.0], [1.0, -4.0], [3.0, 0.0]], dtype=torch.float64)
    mean, variance = [2.0, -2.0], [1.0, 4.0]  # population variance: 4/3 of this with Bessel's correction
    assert ref.block_statistics("mean", keys).tolist() == mean
    for selector in ("taylor2", "cumulant2", "rem"):
        assert ref.block_statistics(selector, keys).tolist() == mean + variance
    assert ref.block_statistics("quest", keys).tolist() == [1.0, -4.0, 3.0, 0.0]
    # Both keys are equally far from the mean: seed 0 is the first. A seed belongs to its own cluster.
    assert ref.block_statistics("km2-rem", keys).tolist() == [1, -4, 0, 0, 3, 0, 0, 0, 2, 2]


@pytest.mark.parametrize("selector", ref.SELECTORS)
def test_width_is_what_statistics_take(selector: str) -> None:
    keys = torch.randn(16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    statistics = ref.block_statistics(selector, keys)
    assert statistics.shape == (ref.statistics_width(selector, 12),)
    assert statistics.dtype == torch.float64


@pytest.mark.parametrize("selector", ["mean", "taylor2", "cumulant2", "rem", "km2-rem"])
def test_scores_are_exact_for_equal_keys(selector: str) -> None:
    gen = torch.Generator().manual_seed(1)
    key, q = torch.randn(2, 8, dtype=torch.float64, generator=gen)
    statistics = ref.block_statistics(selector, key.repeat(32, 1))
    want = math.log(32) + float(q @ key)
    assert ref.selection_score(selector, q, statistics, 32) == pytest.approx(want, abs=1e-12)
    assert ref.mass_score(selector, q, statistics, 32) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(("selector", "order"), [("mean", 2), ("taylor2", 3), ("cumulant2", 3), ("rem", 3)])
def test_scores_approach_the_true_mass(selector: str, order: int) -> None:
    """With one coordinate the diagonal is the whole covariance: halving q divides the error by `2 ** order`."""
    keys = -torch.rand(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).log()  # skewed
    statistics = ref.block_statistics(selector, keys)

    def error(scale: float) -> float:
        q = torch.tensor([scale], dtype=torch.float64)
        return abs(ref.selection_score(selector, q, statistics, 64) - float(torch.logsumexp(keys @ q, 0)))

    assert error(2e-3) / error(1e-3) == pytest.approx(2**order, rel=0.05)


def test_cumulant2_and_taylor2_agree_to_second_order() -> None:
    gen = torch.Generator().manual_seed(3)
    keys = torch.randn(32, 8, dtype=torch.float64, generator=gen)
    q = torch.randn(8, dtype=torch.float64, generator=gen)
    statistics = ref.block_statistics("cumulant2", keys)
    s2 = float(q.square() @ statistics[8:])

    def gap(scale: float) -> float:
        return ref.selection_score("cumulant2", q * scale, statistics, 32) - ref.selection_score(
            "taylor2", q * scale, statistics, 32
        )

    assert gap(1.0) > 0
    assert gap(0.01) == pytest.approx((s2 * 1e-4) ** 2 / 8, rel=1e-2)  # x - log(1 + x) = x^2 / 2 at x = s2 / 2


@pytest.mark.parametrize("count", [2, 16, 128])
def test_rem_branches_meet(count: int) -> None:
    log_count = math.log(count)
    edge, step = 2 * log_count, 1e-6
    assert ref.rem_term(edge * (1 - 1e-12), log_count) == pytest.approx(log_count, rel=1e-10)
    assert ref.rem_term(edge, log_count) == pytest.approx(log_count, rel=1e-12)
    below = (ref.rem_term(edge - step, log_count) - ref.rem_term(edge - 2 * step, log_count)) / step
    above = (ref.rem_term(edge + 2 * step, log_count) - ref.rem_term(edge + step, log_count)) / step
    assert below == pytest.approx(0.5, rel=1e-4)
    assert above == pytest.approx(0.5, rel=1e-4)
    assert ref.rem_term(8 * log_count, log_count) == pytest.approx(3 * log_count)  # sqrt(16) - 1, not 4
    assert ref.rem_term(log_count, log_count) == pytest.approx(log_count / 2)


def test_rem_of_one_key_is_its_logit() -> None:
    assert ref.rem_term(0.0, 0.0) == 0.0
    key, q = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert ref.selection_score("rem", q, ref.block_statistics("rem", key[None]), 1) == pytest.approx(float(q @ key))


def test_quest_bounds_every_logit() -> None:
    gen = torch.Generator().manual_seed(5)
    for _ in range(20):
        keys = torch.randn(16, 4, dtype=torch.float64, generator=gen)
        q = torch.randn(4, dtype=torch.float64, generator=gen)
        bound = ref.selection_score("quest", q, ref.block_statistics("quest", keys), 16)
        assert bound >= float((keys @ q).max())
    assert ref.selection_score("quest", q, ref.block_statistics("quest", keys[:1]), 1) == pytest.approx(
        float(keys[0] @ q)
    ), "the bound of one key is its logit"


def test_quest_has_no_mass() -> None:
    keys = torch.ones(16, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="quest"):
        ref.mass_score("quest", keys[0], ref.block_statistics("quest", keys), 16)
    q, k, v = random_qkv(40, 2, 1, 4)
    for residual in ("regression", "linear"):
        with pytest.raises(ValueError, match="quest"):
            ref.spla_token(q[-1], k, v, replace(BASE, selector="quest", residual=residual))
    result = ref.spla_token(q[-1], k, v, replace(BASE, selector="quest", combine="double_rmsnorm"))
    assert bool(result.output.isfinite().all())


@pytest.mark.parametrize("selector", ["taylor2", "cumulant2", "rem"])
def test_mass_is_second_order_taylor(selector: str) -> None:
    gen = torch.Generator().manual_seed(6)
    keys, q = torch.randn(32, 8, dtype=torch.float64, generator=gen), torch.randn(8, dtype=torch.float64, generator=gen)
    x = keys.numpy()
    s2 = float(q.numpy() ** 2 @ x.var(axis=0))
    want = math.log(32 * (1 + s2 / 2)) + float(q.numpy() @ x.mean(axis=0))
    assert ref.mass_score(selector, q, ref.block_statistics(selector, keys), 32) == pytest.approx(want)


# Clusters


def test_km2_finds_separated_clusters() -> None:
    gen = torch.Generator().manual_seed(7)
    far = torch.tensor([True, False, False, True] * 6 + [False] * 8)  # 12 and 20 keys
    keys = 0.1 * torch.randn(32, 8, dtype=torch.float64, generator=gen)
    keys[far] += 5.0
    first = bool(ref.two_means(keys)[far][0])
    assert ref.two_means(keys).bool().tolist() == [bool(x) == first for x in far]

    statistics = ref.block_statistics("km2-rem", keys)
    parts = [keys[~far], keys[far]] if first else [keys[far], keys[~far]]
    want = [x for part in parts for x in (part.mean(0), part.var(0, correction=0))]
    torch.testing.assert_close(statistics[:-2], torch.cat(want))
    assert statistics[-2:].tolist() == [len(part) for part in parts]


def test_km2_score_and_mass_of_two_tight_clusters_are_exact() -> None:
    """One mean cannot tell where two clusters lie; two can, and without variance every formula is exact."""
    gen = torch.Generator().manual_seed(8)
    a, b, q = torch.randn(3, 8, dtype=torch.float64, generator=gen)
    keys = torch.cat([a.repeat(5, 1), b.repeat(11, 1)])
    want = float(torch.logsumexp(keys @ q, 0))
    statistics = ref.block_statistics("km2-rem", keys)
    assert ref.selection_score("km2-rem", q, statistics, 16) == pytest.approx(want, abs=1e-12)
    assert ref.mass_score("km2-rem", q, statistics, 16) == pytest.approx(want, abs=1e-12)
    assert abs(ref.selection_score("mean", q, ref.block_statistics("mean", keys), 16) - want) > 0.05


def test_km2_score_by_hand() -> None:
    """An outlier, a cluster of one whose score is its logit, and 15 keys on two points that share a centroid."""
    keys = torch.zeros(16, 2, dtype=torch.float64)
    keys[4] = torch.tensor([0.0, 100.0])
    keys[:3, 0], keys[5:8, 0] = 2.0, -2.0
    statistics = ref.block_statistics("km2-rem", keys)
    assert statistics[-2:].tolist() == [1, 15]
    variance = 6 * 4 / 15
    for x in (0.5, 4.0):  # below and above the freezing point of 15 keys
        q = torch.tensor([x, 0.01], dtype=torch.float64)
        s2, log_n = x * x * variance, math.log(15)
        term = s2 / 2 if s2 < 2 * log_n else math.sqrt(2 * s2 * log_n) - log_n
        want = np.logaddexp(1.0, log_n + term)
        assert ref.selection_score("km2-rem", q, statistics, 16) == pytest.approx(float(want), abs=1e-12)
        assert ref.mass_score("km2-rem", q, statistics, 16) == pytest.approx(
            float(np.logaddexp(1.0, log_n + math.log(1 + s2 / 2))), abs=1e-12
        )


def test_km2_runs_exactly_four_updates_after_the_seeds() -> None:
    """Keys on a line where the boundary creeps by one key an iteration: fewer or more iterations end elsewhere."""

    def lloyd(keys: np.ndarray, updates: int) -> list[int]:
        centroids = [keys[np.argmax((keys - keys.mean()) ** 2)]]
        centroids.append(keys[np.argmax((keys - centroids[0]) ** 2)])
        for update in range(updates + 1):
            nearest = [int(abs(x - centroids[1]) < abs(x - centroids[0])) for x in keys]
            if update < updates:
                centroids = [np.mean([x for x, n in zip(keys, nearest, strict=True) if n == i]) for i in (0, 1)]
        return nearest

    keys = np.array([1, 3, 7, 8, 10, 20, 21, 22, 23, 24, 25, 28, 29, 29, 29, 30, 32, 34, 44, 53], dtype=np.float64)
    by_updates = [lloyd(keys, updates) for updates in range(7)]
    assert by_updates[3] != by_updates[4] != by_updates[5], "the example must tell four updates from three and five"
    assert ref.two_means(torch.from_numpy(keys)[:, None]).tolist() == by_updates[4]


def test_km2_of_equal_keys_leaves_one_cluster_empty() -> None:
    statistics = ref.block_statistics("km2-rem", torch.full((16, 2), 0.5, dtype=torch.float64))
    assert statistics.tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0, 16, 0]


# Selection


def test_forced_blocks_by_hand() -> None:
    params = SplaParameters(64, 16, budget_blocks=99, first_blocks=2, last_blocks=3)
    assert ref.forced_blocks(0, params) == [0]
    assert ref.forced_blocks(130, params) == [0, 1, 6, 7, 8]  # current block 8 opens page 2
    assert ref.forced_blocks(191, params) == [0, 1, 8, 9, 10, 11]  # the page's last token: its four blocks and no more
    assert ref.forced_blocks(192, params) == [0, 1, 10, 11, 12]
    assert ref.forced_blocks(100, replace(params, first_blocks=0, last_blocks=1)) == [4, 5, 6]


@pytest.mark.parametrize(("page", "block"), [(16, 16), (64, 16), (64, 32), (48, 16)])
def test_selected_sets_obey_the_rules(page: int, block: int) -> None:
    for seed, (first, last) in enumerate([(1, 1), (0, 3), (2, 2)]):
        least = first + max(last, page // block)
        params = SplaParameters(page, block, least + 2, first, last, selector="mean", residual="none")
        q, k, v = random_qkv(400, 4, 2, 4, seed)
        for length in (1, page, page + 1, 3 * page + 5, 399, 400):
            position = length - 1
            forced = {i for i in range(position // block + 1) if i < first or i >= position // block - last + 1}
            forced |= {t // block for t in range(position // page * page, length)}
            for blocks in ref.spla_token(q[position], k[:length], v[:length], params).selected:
                assert blocks == sorted(set(blocks))
                assert forced <= set(blocks)
                assert set(blocks) <= set(range(position // block + 1))
                assert len(blocks) == min(least + 2, position // block + 1)


@pytest.mark.parametrize("selector", ref.SELECTORS)
def test_top_k_matches_an_independent_sort(selector: str) -> None:
    """Softmax a head, summed over the group, as probabilities in numpy: the rule before it went into logs."""
    params = SplaParameters(32, 16, 7, selector=selector, residual="none")
    q, k, v = random_qkv(300, 6, 2, 8)
    got = ref.spla_token(q[-1], k, v, params)
    for g in (0, 1):
        probability = np.zeros(18)
        for h in range(3 * g, 3 * g + 3):
            statistics = [ref.block_statistics(selector, k[16 * i : 16 * i + 16, g]) for i in range(18)]
            scores = np.array([ref.selection_score(selector, q[-1, h], s, 16) for s in statistics])
            probability += np.exp(scores) / np.exp(scores).sum()
        free = [i for i in np.argsort(-probability) if i not in (0, 17)]
        assert got.selected[g] == sorted([0, 17, 18, *free[:4]])
        np.testing.assert_allclose(np.exp(got.group_scores[g].numpy()), probability, rtol=1e-10)


def test_ties_go_to_the_lower_index() -> None:
    params = replace(BASE, budget_blocks=5)
    assert ref.select_blocks(torch.zeros(10, dtype=torch.float64), 160, params) == [0, 1, 2, 9, 10]
    scores = torch.tensor([0.0, 1, 2, 2, 2, 1, 2, 2, 0, 0], dtype=torch.float64)
    assert ref.select_blocks(scores, 160, params) == [0, 2, 3, 9, 10]


def test_top_p_stops_when_the_mass_is_covered() -> None:
    mass = torch.tensor([0.10, 0.01, 0.20, 0.05, 0.30, 0.02, 0.15, 0.03, 0.04, 0.10], dtype=torch.float64)
    params = replace(BASE, budget_blocks=8)  # of 11 blocks; forced: 0, 9 and the current 10; mass 0.2 forced

    def chosen(top_p: float | None, factor: float = 1.0) -> list[int]:
        blocks = ref.select_blocks((factor * mass).log(), 160, replace(params, top_p=top_p))
        assert {0, 9, 10} <= set(blocks)
        return [block for block in blocks if block not in (0, 9, 10)]

    assert chosen(0.1) == []
    assert chosen(0.19) == []
    assert chosen(0.21) == [4]
    assert chosen(0.49) == [4]
    assert chosen(0.51) == [2, 4], "the block that crosses the threshold belongs to the selection"
    assert chosen(0.71) == [2, 4, 6]
    assert chosen(0.95) == [2, 3, 4, 6, 8], "the budget still holds"
    assert chosen(0.51, factor=4) == [2, 4], "a share of the group's mass, whatever its size"
    assert chosen(1.0) == chosen(None) == [2, 3, 4, 6, 8]


def test_top_p_of_one_keeps_the_budget_despite_rounding() -> None:
    """Blocks too far to change the sum in float64 still fill the budget."""
    scores = torch.tensor([0.0] + [-100.0 - i for i in range(9)], dtype=torch.float64)
    assert ref.select_blocks(scores, 160, replace(BASE, budget_blocks=6, top_p=1.0)) == [0, 1, 2, 3, 9, 10]
    assert ref.select_blocks(scores, 160, replace(BASE, budget_blocks=6, top_p=0.999)) == [0, 9, 10]


def test_top_p_leaves_a_context_within_the_budget_alone() -> None:
    scores = torch.tensor([0.0] + [-100.0] * 9, dtype=torch.float64)
    assert ref.select_blocks(scores, 160, replace(BASE, budget_blocks=11, top_p=0.5)) == list(range(11))


def test_group_sharing_ignores_shifts_of_a_head() -> None:
    gen = torch.Generator().manual_seed(9)
    scores = torch.randn(4, 12, dtype=torch.float64, generator=gen) * 3
    shifts = torch.tensor([[0.0], [500.0], [-900.0], [3.0]], dtype=torch.float64)
    torch.testing.assert_close(ref.share_in_group(scores + shifts), ref.share_in_group(scores), rtol=0, atol=1e-11)
    torch.testing.assert_close(ref.share_in_group(scores).exp(), scores.softmax(1).sum(0))
    assert not torch.allclose(scores.logsumexp(0), ref.share_in_group(scores), atol=0.1), "normalised a head"


def test_group_sharing_keeps_the_order_of_far_blocks() -> None:
    scores = torch.tensor([[0.0, -2000.0, -1900.0, -2100.0]] * 2, dtype=torch.float64)
    assert ref.share_in_group(scores).argsort(descending=True).tolist() == [0, 2, 1, 3]


def test_heads_of_a_group_share_and_groups_do_not() -> None:
    params = replace(BASE, residual="none", budget_blocks=5)
    q, k, v = random_qkv(300, 6, 2, 8, seed=3)
    before = ref.spla_token(q[-1], k, v, params).selected
    other = q[-1].clone()
    other[3:] = -other[3:]  # the heads of kv head 1
    after = ref.spla_token(other, k, v, params).selected
    assert after[0] == before[0]
    assert after[1] != before[1]


# Learned sinks


def random_sinks(heads: int, seed: int = 0) -> Tensor:
    """From next to nothing of a head's mass to most of it."""
    return 2 + 3 * torch.randn(heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_sink_is_a_token_without_a_value() -> None:
    """Within the budget, it is dense attention to one token more, whose value is 0."""
    q, k, v = random_qkv(60, 4, 2, 8)
    sinks = random_sinks(4)
    got = ref.spla_token(q[-1], k, v, BASE, sinks=sinks)
    for h in range(4):
        logits = torch.cat([k[:, h // 2] @ q[-1, h], sinks[h : h + 1]])
        want = logits.softmax(0)[:-1] @ v[:, h // 2]
        torch.testing.assert_close(got.output[h], want, rtol=1e-12, atol=1e-13)
    assert float((got.output - ref.spla_token(q[-1], k, v, BASE).output).abs().max()) > 0.1


@pytest.mark.parametrize("residual", ["regression", "linear", "none"])
def test_sinks_count_once_in_the_merged_denominator(residual: str) -> None:
    gain = torch.tensor([1.0, 0.25, 0.0, 3.0], dtype=torch.float64)
    params = replace(BASE, residual=residual)
    q, k, v = random_qkv(200, 4, 2, 8)
    sinks = random_sinks(4)
    got = ref.spla_token(q[-1], k, v, params, gain=gain, sinks=sinks)
    for h in range(4):
        seen = ref.tokens_of(got.selected[h // 2], 200, 16)
        weights = torch.exp(k[seen, h // 2] @ q[-1, h])
        mass = gain[h] * got.log_tail_mass[h].exp()
        total = weights.sum() + mass + sinks[h].exp()
        want = (weights @ v[seen, h // 2] + mass * got.tail[h]) / total
        torch.testing.assert_close(got.output[h], want, rtol=1e-11, atol=1e-13)


def test_no_sink_is_one_of_no_mass() -> None:
    q, k, v = random_qkv(200, 4, 2, 8)
    nothing = torch.full((4,), -math.inf, dtype=torch.float64)
    got, want = (ref.spla_token(q[-1], k, v, BASE, sinks=sinks) for sinks in (nothing, None))
    assert got.selected == want.selected and torch.equal(got.output, want.output)
    everything = ref.spla_token(q[-1], k, v, BASE, sinks=torch.full((4,), 800.0, dtype=torch.float64))
    assert bool(everything.output.isfinite().all()) and float(everything.output.abs().max()) == 0


def test_sinks_in_the_heads_normalisers() -> None:
    """A head's share of a block is its attention to it, of which the sink has its part."""
    scores = 3 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sinks = random_sinks(4)
    with_sinks = torch.cat([scores, sinks[:, None]], 1).softmax(1)
    torch.testing.assert_close(ref.share_in_group(scores, sinks).exp(), with_sinks[:, :-1].sum(0))
    # Two heads that want different blocks: the one that gives all to its sink is not asked.
    scores = torch.tensor([[3.0, 0, 0, 0], [0, 0, 0, 4.0]], dtype=torch.float64)
    assert int(ref.share_in_group(scores).argmax()) == 3
    assert int(ref.share_in_group(scores, torch.tensor([-9.0, 9.0], dtype=torch.float64)).argmax()) == 0


def test_top_p_with_sinks() -> None:
    """The mass of which a share is wanted is that of blocks: what goes to sinks is none of it, nor covered by them."""
    params = replace(BASE, budget_blocks=9, top_p=0.7)
    q, k, v = random_qkv(330, 4, 2, 8)
    got = ref.spla_token(q[-1], k, v, params, sinks=random_sinks(4))
    for g in range(2):
        mass = got.group_scores[g].exp()
        chosen = [i for i in got.selected[g] if i < 20]
        free = [i for i in chosen if i not in (0, 19)]
        assert 3 < len(got.selected[g]) < 9, "top-p stopped it"
        least = min(free, key=lambda i: float(mass[i]))
        covered, wanted = float(mass[chosen].sum()), 0.7 * float(mass.sum())
        assert covered >= wanted > covered - float(mass[least])


def test_sinks_under_double_rmsnorm_are_refused() -> None:
    q, k, v = random_qkv(60, 4, 2, 8)
    params = replace(BASE, combine="double_rmsnorm")
    with pytest.raises(ValueError, match="would undo learned attention sinks"):
        ref.spla_token(q[-1], k, v, params, sinks=random_sinks(4))


# Exact part, residual, combination


@pytest.mark.parametrize("selector", ["mean", "rem"])
def test_exact_part_sees_the_selected_tokens_only(selector: str) -> None:
    params = SplaParameters(32, 16, 6, selector=selector)
    q, k, v = random_qkv(250, 4, 2, 8)
    got = ref.spla_token(q[-1], k, v, params)
    for h in range(4):
        visible = [t for t in range(250) if t // 16 in got.selected[h // 2]]
        weights = np.exp((k[visible, h // 2] @ q[-1, h]).numpy())
        np.testing.assert_allclose(got.exact[h].numpy(), weights @ v[visible, h // 2].numpy() / weights.sum())
        assert float(got.lse[h]) == pytest.approx(math.log(weights.sum()))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("page", "block"), [(16, 16), (32, 16)])
def test_regression_residual_from_the_rest_itself(page: int, block: int, scale: float) -> None:
    params = SplaParameters(page, block, 5, residual_scale=scale)
    q, k, v = random_qkv(200, 4, 2, 8)
    got = ref.spla_token(q[-1], k, v, params)
    for h in range(4):
        rest = rest_tokens(got, h // 2, 200, params)
        assert len(rest) > 0
        keys, values = k[rest, h // 2].numpy(), v[rest, h // 2].numpy()
        both = np.cov(keys, values, rowvar=False, bias=True)[:8, 8:]  # [key, value]
        want = values.mean(axis=0) + scale * q[-1, h].numpy() @ both
        np.testing.assert_allclose(got.tail[h].numpy(), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("combine", ["shared_normalizer", "double_rmsnorm"])
@pytest.mark.parametrize("feature_map", ref.FEATURE_MAPS)
def test_linear_residual_from_the_rest_itself(feature_map: str, combine: str) -> None:
    params = replace(BASE, residual="linear", feature_map=feature_map, combine=combine)
    q, k, v = random_qkv(200, 4, 2, 8)
    got = ref.spla_token(q[-1], k, v, params)

    def phi(x: np.ndarray) -> np.ndarray:
        if feature_map == "softmax":
            return np.asarray(np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True))
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    for h in range(4):
        rest = rest_tokens(got, h // 2, 200, params)
        weights = phi(k[rest, h // 2].numpy()) @ phi(q[-1, h].numpy())  # one a token: no state involved
        want = weights @ v[rest, h // 2].numpy()
        if combine == "shared_normalizer":
            want /= weights.sum()
        np.testing.assert_allclose(got.tail[h].numpy(), want, rtol=1e-9, atol=1e-12)


def test_residual_none_has_no_tail() -> None:
    q, k, v = random_qkv(200, 4, 2, 8)
    got = ref.spla_token(q[-1], k, v, replace(BASE, residual="none"))
    assert torch.equal(got.output, got.exact)
    assert float(got.tail.abs().max()) == 0
    assert bool((got.log_tail_mass == -math.inf).all())


@pytest.mark.parametrize("selector", WITH_MASS)
def test_shared_normalizer_by_plain_sums(selector: str) -> None:
    gain = torch.tensor([1.0, 0.25, 0.0, 3.0], dtype=torch.float64)
    params = replace(BASE, selector=selector)
    q, k, v = random_qkv(200, 4, 2, 8)
    got = ref.spla_token(q[-1], k, v, params, gain=gain)
    for h in range(4):
        rest = sorted({t // 16 for t in rest_tokens(got, h // 2, 200, params)})
        mass = 0.0
        for i in rest:
            statistics = ref.block_statistics(selector, k[16 * i : 16 * i + 16, h // 2])
            mass += math.exp(ref.mass_score(selector, q[-1, h], statistics, 16))
        assert float(got.log_tail_mass[h]) == pytest.approx(math.log(mass))
        a, b = math.exp(float(got.lse[h])), float(gain[h]) * mass
        torch.testing.assert_close(got.output[h], (a * got.exact[h] + b * got.tail[h]) / (a + b))
    assert torch.equal(got.output[2], got.exact[2]), "gain 0 drops the tail"
    assert not torch.allclose(got.output[3], got.exact[3], rtol=1e-2)
    torch.testing.assert_close(
        ref.spla_token(q[-1], k, v, params).output[0], got.output[0], rtol=0, atol=0, msg="no gain is a gain of 1"
    )


def test_shared_normalizer_does_not_overflow() -> None:
    one = torch.ones(2, dtype=torch.float64)
    for lse, mass in ((5000.0, 5000.0), (-5000.0, -5000.0)):
        torch.testing.assert_close(ref.combine_shared_normalizer(one, lse, 3 * one, mass, 1.0), 2 * one)
    assert torch.equal(ref.combine_shared_normalizer(one, -5000.0, 3 * one, 5000.0, 1.0), 3 * one)
    assert torch.equal(ref.combine_shared_normalizer(one, 5000.0, 3 * one, -5000.0, 1.0), one)


@pytest.mark.parametrize("residual", ["regression", "linear"])
def test_double_rmsnorm_adds_two_normalised_branches(residual: str) -> None:
    gen = torch.Generator().manual_seed(11)
    weights = torch.randn(2, 4, 8, dtype=torch.float64, generator=gen)
    params = replace(BASE, residual=residual, combine="double_rmsnorm", rms_norm_eps=1e-2)
    q, k, v = random_qkv(200, 4, 2, 8)
    got = ref.spla_token(q[-1], k, v, params, norm_weights=(weights[0], weights[1]))
    want = F.rms_norm(got.exact, [8], eps=1e-2) * weights[0] + F.rms_norm(got.tail, [8], eps=1e-2) * weights[1]
    torch.testing.assert_close(got.output, want)
    unweighted = ref.spla_token(q[-1], k, v, params).output
    torch.testing.assert_close(unweighted, F.rms_norm(got.exact, [8], eps=1e-2) + F.rms_norm(got.tail, [8], eps=1e-2))


# Entry points


def test_given_statistics_are_used() -> None:
    params = replace(BASE, budget_blocks=4, selector="rem")
    q, k, v = random_qkv(200, 4, 2, 8)
    own = ref.complete_statistics(k, params)
    assert own.shape == (12, 2, 16)
    plain, given = (ref.spla_token(q[-1], k, v, params, statistics=s) for s in (None, own))
    assert torch.equal(plain.output, given.output)

    raised = own.clone()
    raised[5, 0, 8:] += 1e4  # block 5 of kv head 0 now looks wide
    got = ref.spla_token(q[-1], k, v, params, statistics=raised)
    assert 5 in got.selected[0]
    assert got.selected[1] == plain.selected[1]
    torch.testing.assert_close(ref.block_statistics("rem", k[16:32, 1]), own[1, 1], rtol=0, atol=0)


@pytest.mark.parametrize("combine", ["shared_normalizer", "double_rmsnorm"])
def test_sequence_is_token_by_token_and_causal(combine: str) -> None:
    params = SplaParameters(32, 16, 4, combine=combine)
    q, k, v = random_qkv(110, 4, 2, 8)
    gain = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(12))
    norms = (1 + q[0], 1 - q[1])
    out = ref.spla_sequence(q, k, v, params, start=60, gain=gain, norm_weights=norms)
    assert bool(out[:60].isnan().all())
    for position in (60, 63, 64, 95, 96, 109):
        past = slice(0, position + 1)
        want = ref.spla_token(q[position], k[past], v[past], params, gain=gain, norm_weights=norms)
        assert torch.equal(out[position], want.output)


def test_a_block_joins_the_rest_with_its_page() -> None:
    """Position 31 still sees page 1 as current; only from position 32 on may its blocks be left out."""
    params = SplaParameters(32, 16, 3, first_blocks=0, last_blocks=1, residual="none", selector="mean")
    q, k, v = random_qkv(80, 1, 1, 8)
    at = [ref.spla_token(q[p], k[: p + 1], v[: p + 1], params) for p in (31, 32, 63, 64)]
    assert [r.group_scores.shape[1] for r in at] == [0, 2, 2, 4]
    assert [len(r.selected[0]) for r in at] == [2, 3, 3, 3]
    assert {2, 3} <= set(at[2].selected[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selector": "best"}, "selector"),
        ({"residual": "cubic"}, "residual"),
        ({"combine": "sum"}, "combine"),
        ({"feature_map": "exp"}, "feature map"),
        ({"selection_block": 12}, "selection_block"),
        ({"budget_blocks": 2}, "budget_blocks"),
    ],
    ids=lambda x: "-".join(f"{key}={value}" for key, value in x.items()) if isinstance(x, dict) else "",
)
def test_bad_parameters_are_refused(change: dict[str, object], message: str) -> None:
    q, k, v = random_qkv(40, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        ref.spla_token(q[-1], k, v, replace(BASE, **change))  # type: ignore[arg-type]


def test_bad_tensors_are_refused() -> None:
    q, k, v = random_qkv(40, 4, 2, 8)
    with pytest.raises(ValueError, match="float64"):
        ref.spla_token(q[-1].float(), k, v, BASE)
    with pytest.raises(ValueError, match="multiple"):
        ref.spla_token(q[-1, :3], k, v, BASE)
    with pytest.raises(ValueError, match="expected"):
        ref.spla_token(q[-1], k, v[:-1], BASE)
    with pytest.raises(ValueError, match="statistics"):
        ref.spla_token(q[-1], k, v, BASE, statistics=torch.zeros(3, 2, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="gain"):
        ref.spla_token(q[-1], k, v, BASE, gain=torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="norm_weights"):
        ref.spla_token(q[-1], k, v, BASE, norm_weights=(q[-1, :2], q[-1]))
