"""What layers lose under SPLA: the estimate is the divergence, and ranks layers as that does."""

from functools import partial

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from spla_backend.algorithm.parameters import SplaParameters  # noqa: E402
from spla_backend.algorithm.sequence import spla_attention  # noqa: E402
from spla_backend.calibrate.costs import Continued, gradients, head_groups, layer_costs, loss_of  # noqa: E402
from spla_backend.evaluate.fidelity import attention  # noqa: E402

from ..evaluate.test_capture import save  # noqa: E402
from .test_calibrate import random_tokens  # noqa: E402

PARAMS = SplaParameters(page_size=16, selection_block=16, budget_blocks=5)


def test_estimate_is_the_divergence(tmp_path):
    """Of a small random change in the outputs of the first layer, at all positions of a document's end."""
    model, tokens, start = Continued(save(tmp_path), head=True), random_tokens(400, 0), 80
    model.begin(tokens[:start])
    change = 0.02 * torch.randn(4, len(tokens) - start, 32, generator=torch.Generator().manual_seed(0))
    whole = SplaParameters(16, 16, 400 // 16, residual="none")

    def changed(inputs):
        q, k, v = (x[None] for x in (inputs.q, inputs.k, inputs.v))
        return spla_attention(q, k, v, whole)[0] + change if inputs.layer == 0 else None

    with torch.no_grad():
        dense, other = (model.go_on(tokens[start:], visit).log_softmax(-1) for visit in (None, changed))
    divergence = (dense.exp() * (dense - other)).sum(-1).mean().item()
    positions = torch.arange(start, len(tokens))
    torch.manual_seed(0)
    estimates = []
    for _ in range(6):
        inputs, gradient = gradients(model, tokens, start, 16)[0]
        assert inputs.layer == 0 and inputs.k.shape[1] == len(tokens)
        by_group = change.unflatten(0, (2, 2)).transpose(1, 2)  # [kv_heads, queries, group, head_size]
        pairs = zip(by_group, head_groups(inputs, gradient, positions), strict=True)
        estimates.append(sum(loss_of(mine, own).item() for mine, (_, own) in pairs))
    assert sum(estimates) / len(estimates) == pytest.approx(divergence, rel=0.25)


def test_costs_rank_layers_as_their_divergence_does(tmp_path):
    """Of one layer under SPLA, all others dense; layers are made to matter by different amounts."""
    model, tail = Continued(save(tmp_path, num_hidden_layers=4), head=True), 96
    with torch.no_grad():
        for layer, weight in zip(model.model.model.layers, (0.01, 1.0, 0.0, 0.3), strict=True):
            layer.self_attn.o_proj.weight.mul_(weight)
    documents, layers, seen = [random_tokens(400, seed) for seed in range(3)], dict.fromkeys(range(4), PARAMS), []
    costs = layer_costs(
        model, documents, layers, dict.fromkeys(layers, (5, 25)), tail=tail, report=lambda: seen.append(1)
    )
    assert len(seen) == 3 * 4 and all(cost[25] == pytest.approx(0, abs=1e-9) for cost in costs.values())

    def divergence(layer: int) -> float:
        total = 0.0
        for tokens in documents:
            dense, sparse = (
                model.run(tokens, visit).logits[0, -tail:].log_softmax(-1)
                for visit in (None, partial(attention, params={layer: PARAMS}))
            )
            total += (dense.exp() * (dense - sparse)).sum(-1).mean().item()
        return total / len(documents)

    true = {i: divergence(i) for i in layers}
    assert sorted(layers, key=true.__getitem__) == [2, 3, 0, 1]
    assert {i: cost[5] for i, cost in costs.items()} == pytest.approx(true, rel=0.35)
