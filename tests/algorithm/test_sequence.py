"""The differentiable form against the float64 definition, and its gradients."""

from dataclasses import replace

import pytest
import torch

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.reference import SELECTORS, complete_statistics, spla_sequence
from spla_backend.algorithm.selectors import block_statistics, get_selector
from spla_backend.algorithm.sequence import FLEX_QUERIES, attend_flex, flex_mask, spla_attention
from spla_backend.algorithm.statistics_format import decode, encode

BASE = SplaParameters(page_size=8, selection_block=4, budget_blocks=4, first_blocks=1, last_blocks=2)
CASES = {
    "none": replace(BASE, residual="none"),
    "mean": replace(BASE, selector="mean", residual="none", page_size=4),
    "quest": replace(BASE, selector="quest", residual="none"),
    "regression": BASE,
    "regression-km2": replace(BASE, selector="km2-rem"),
    "regression-top-p": replace(BASE, top_p=0.7, budget_blocks=5),
    "linear": replace(BASE, residual="linear", selector="taylor2"),
    "linear-elu1": replace(BASE, residual="linear", feature_map="elu1"),
    "rmsnorm": replace(BASE, residual="linear", combine="double_rmsnorm", selector="taylor2"),
    "rmsnorm-coarse": replace(BASE, residual="linear", combine="double_rmsnorm", selection_block=8, budget_blocks=3),
    "rmsnorm-none": replace(BASE, residual="none", combine="double_rmsnorm"),
    "two-levels": replace(BASE, fine_block=2),
    "two-levels-int4": replace(BASE, fine_block=2, fine_source="int4"),
    "two-levels-of-one-size": replace(BASE, fine_block=4),
    "two-levels-top-p": replace(BASE, fine_block=1, top_p=0.7),
    "two-levels-km2": replace(BASE, selector="km2-rem", page_size=4, fine_block=2),
    "two-levels-quest": replace(BASE, selector="quest", residual="none", fine_block=2),
    "two-levels-linear": replace(
        BASE, residual="linear", selector="mean", fine_block=2, least_candidates=3 * BASE.budget_blocks
    ),
    "two-levels-rmsnorm": replace(BASE, residual="linear", combine="double_rmsnorm", fine_block=2),
}


def inputs(heads: int, kv_heads: int, length: int, d: int = 8, batch: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = 1.5 * random(batch, heads, length, d), random(batch, kv_heads, length, d)
    v = random(batch, kv_heads, length, d)
    return q, k, v, random(heads), (random(heads, d), random(heads, d))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("heads", "kv_heads", "batch"), [(4, 2, 1), (3, 1, 2)])
def test_equals_the_definition(name, heads, kv_heads, batch):
    params = CASES[name]
    q, k, v, log_gain, norms = inputs(heads, kv_heads, length=45, batch=batch, seed=heads)
    actual = spla_attention(q, k, v, params, log_gain=log_gain, norm_weights=norms, chunk=17)
    for i in range(len(q)):
        expected = spla_sequence(
            q[i].transpose(0, 1),
            k[i].transpose(0, 1),
            v[i].transpose(0, 1),
            params,
            gain=log_gain.exp(),
            norm_weights=norms,
        )
        torch.testing.assert_close(actual[i].transpose(0, 1), expected, rtol=1e-10, atol=1e-11)


WITH_SINKS = ["none", "quest", "regression", "regression-top-p", "linear", "two-levels", "two-levels-top-p"]


@pytest.mark.parametrize("name", WITH_SINKS)
@pytest.mark.parametrize(("heads", "kv_heads", "batch"), [(4, 2, 1), (3, 1, 2)])
def test_sinks_equal_the_definition(name, heads, kv_heads, batch):
    params = CASES[name]
    q, k, v, log_gain, (sinks, _) = inputs(heads, kv_heads, length=45, batch=batch, seed=heads)
    sinks = 3 * sinks[:, 0]
    actual = spla_attention(q, k, v, params, log_gain=log_gain, sinks=sinks, chunk=17)
    for i in range(len(q)):
        parts = (x[i].transpose(0, 1) for x in (q, k, v))
        expected = spla_sequence(*parts, params, gain=log_gain.exp(), sinks=sinks)
        torch.testing.assert_close(actual[i].transpose(0, 1), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["none", "regression", "linear"])
def test_gradients_of_sinks(name):
    q, k, v, _, (sinks, _) = inputs(2, 1, length=27, d=2, batch=1)
    leaves = [x.requires_grad_() for x in (sinks[:, 0].clone(), q, k, v)]

    def attend(sinks, q, k, v):
        return spla_attention(q, k, v, CASES[name], sinks=sinks, chunk=10)

    assert torch.autograd.gradcheck(attend, leaves, atol=1e-6)


def test_sinks_under_double_rmsnorm_are_refused():
    q, k, v, sinks, _ = inputs(2, 1, length=27, batch=1)
    with pytest.raises(ValueError, match="would undo learned attention sinks"):
        spla_attention(q, k, v, CASES["rmsnorm"], sinks=sinks)


@pytest.mark.parametrize("selector", SELECTORS)
def test_statistics_in_fp8(selector):
    """Selection and mass are those of the rounded statistics, the gradient is that of the exact ones."""
    params = replace(BASE, selector=selector, residual="regression" if get_selector(selector).has_mass else "none")
    q, k, v, _, _ = inputs(4, 2, length=61, batch=1)
    k = 3 * k + 1
    in_fp8 = replace(params, statistics_dtype="fp8")
    actual = spla_attention(q, k, v, in_fp8)
    exact = complete_statistics(k[0].transpose(0, 1), params)
    formats = get_selector(selector).formats(8)
    rounded = decode(encode(exact, formats), formats).double()
    parts = [x[0].transpose(0, 1) for x in (q, k, v)]
    expected = spla_sequence(*parts, params, statistics=rounded)
    torch.testing.assert_close(actual[0].transpose(0, 1), expected, rtol=1e-10, atol=1e-11)
    assert not torch.allclose(expected, spla_sequence(*parts, params, statistics=exact)) or selector == "quest"

    gradients = []
    for used in (params, in_fp8):
        keys = k[:, :, :56].unflatten(2, (-1, 4)).clone().requires_grad_()
        statistics = block_statistics(keys, used)
        statistics.backward(torch.linspace(-1, 1, statistics.numel(), dtype=torch.float64).view_as(statistics))
        gradients.append(keys.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["none", "regression", "rmsnorm"])
def test_last_tokens_alone(name):
    """As with a cache of keys and values."""
    q, k, v, log_gain, norms = inputs(4, 2, length=61)
    whole = spla_attention(q, k, v, CASES[name], log_gain=log_gain, norm_weights=norms)
    last = spla_attention(q[:, :, -5:], k, v, CASES[name], log_gain=log_gain, norm_weights=norms)
    torch.testing.assert_close(last, whole[:, :, -5:])


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    """Of queries, keys, values and learned parameters, against finite differences, which change no selection here."""
    q, k, v, log_gain, norms = inputs(2, 1, length=27, d=2, batch=1)
    scale = torch.tensor([0.4], dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (scale, q, k, v, log_gain, *norms)]

    def attend(scale, q, k, v, log_gain, *norms):
        params = replace(CASES[name], rms_norm_eps=1e-3, residual_scale=scale)
        return spla_attention(q, k, v, params, log_gain=log_gain, norm_weights=norms, chunk=10)

    assert torch.autograd.gradcheck(attend, leaves, eps=1e-7, atol=1e-5, fast_mode=True)


def test_rows_without_a_rest_have_finite_gradients():
    """Most tokens of a short sequence attend to everything, whatever the residual."""
    for params in CASES.values():
        q, k, v, log_gain, norms = inputs(2, 1, length=14)
        leaves = [x.requires_grad_() for x in (q, k, v, log_gain, *norms)]
        spla_attention(q, k, v, params, log_gain=log_gain, norm_weights=norms).sum().backward()
        assert all(x.grad is None or bool(x.grad.isfinite().all()) for x in leaves)


def test_shapes_are_checked():
    q, k, v, _, _ = inputs(4, 2, length=5)
    with pytest.raises(ValueError, match="a multiple of G"):
        spla_attention(q[:, :3], k, v, BASE)
    with pytest.raises(ValueError, match="T >= L"):
        spla_attention(q, k[:, :, :3], v[:, :, :3], BASE)


@pytest.mark.parametrize(("length", "block"), [(300, 16), (259, 48), (384, 256)])
def test_flex_attention_sees_the_same_tokens(length, block):
    """Uncompiled, which on a CPU has no backward pass; the tiles, which it does not look at, hold what is visible."""
    q, k, v, _, _ = inputs(6, 2, length)
    positions = torch.arange(length)
    complete = torch.arange(1, length // block + 1) * block <= positions[:, None]
    rest = complete & (torch.rand(2, 2, length, length // block, generator=torch.Generator().manual_seed(1)) < 0.9)
    tokens = torch.nn.functional.pad(rest.repeat_interleave(block, -1), (0, length % block)).repeat_interleave(3, 1)
    visible = (positions <= positions[:, None]) & ~tokens  # [batch, H, queries, tokens]
    logits = torch.where(visible, q @ k.repeat_interleave(3, 1).mT, -torch.inf)
    output, lse = attend_flex(q, k, v, rest, block)
    torch.testing.assert_close(output, logits.softmax(-1) @ v.repeat_interleave(3, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-5, check_dtype=False)
    mask = flex_mask(rest, block, 3)
    tile = mask.BLOCK_SIZE[1]
    tiles = torch.zeros(2, 6, -(-length // FLEX_QUERIES), -(-length // tile), dtype=torch.bool)
    batch, head, query, token = visible.nonzero(as_tuple=True)
    tiles[batch, head, query // FLEX_QUERIES, token // tile] = True
    assert torch.equal(mask.to_dense().bool(), tiles)
