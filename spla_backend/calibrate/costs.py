"""What layers lose under SPLA, at one budget or at several, to second order.

What a budget changes in the output of a kv head's query heads, `delta`, costs `E (g . delta)^2 / 2` nats, where `g` is
the gradient of the loss of tokens drawn from the model itself: its Fisher information, hence the divergence from the
dense model. One backward pass a document gives `g` for all layers. What heads and layers cost is added up as if none
saw what another changed.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from transformers import DynamicCache

from ..algorithm.parameters import SplaParameters
from ..algorithm.sequence import spla_attention
from ..evaluate.capture import AttentionInputs, CapturingModel, Visit
from ..evaluate.fidelity import HeadGroup, Point, sample_positions


class Continued(CapturingModel):
    """A model that reads the beginning of a document densely, once, and its end as often as wanted."""

    def begin(self, tokens: Sequence[int]) -> None:
        """Read the beginning."""
        self._cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([list(tokens)], device=self.model.device)
        with torch.no_grad():
            self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def go_on(self, tokens: Sequence[int], visit: Visit | None) -> torch.Tensor:
        """Logits `[tokens, vocabulary]` of the end; `visit` as in `CapturingModel.forward`, its keys are the whole
        document's."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        self._visit = visit
        try:
            # A copy: what layers with windows have dropped could not be brought back.
            return self.model(input_ids=ids, past_key_values=deepcopy(self._cache), use_cache=True).logits[0]
        finally:
            self._visit = None


def gradients(
    model: Continued, tokens: Sequence[int], start: int, page_size: int
) -> list[tuple[AttentionInputs, torch.Tensor]]:
    """Attention of the end of a document.

    Args:
        model: With its head.
        tokens: Of the document.
        start: Where the end begins.
        page_size: Tokens a page.

    Returns:
        What each layer's attention sees, and the gradient of the loss in its output `[num_heads, tokens, head_size]`
        float32, for next tokens that are drawn from the model.
    """
    seen: list[tuple[AttentionInputs, torch.Tensor]] = []

    def visit(inputs: AttentionInputs) -> torch.Tensor:
        q, k, v = (x.float() for x in (inputs.q, inputs.k, inputs.v))
        change = torch.zeros_like(q, requires_grad=True)
        seen.append((AttentionInputs(inputs.layer, q.detach(), k.detach(), v.detach()), change))
        whole = SplaParameters(page_size, page_size, -(-k.shape[1] // page_size), residual="none")
        return spla_attention(q[None], k[None], v[None], whole)[0] + change

    model.begin(tokens[:start])
    logits = model.go_on(tokens[start:], visit).float()
    drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return [(inputs, change.grad) for inputs, change in seen if change.grad is not None]


def head_groups(
    inputs: AttentionInputs, gradient: torch.Tensor, positions: torch.Tensor
) -> Iterator[tuple[HeadGroup, torch.Tensor]]:
    """By kv head: its query heads at some positions `[queries]` int64 of the document, and the gradient there
    `[queries, group, head_size]`. Arguments as from `gradients`."""
    start, positions = inputs.k.shape[1] - inputs.q.shape[1], positions.to(inputs.k.device)
    q, gradient = (
        x[:, positions - start].unflatten(0, (inputs.k.shape[0], -1)).transpose(1, 2) for x in (inputs.q, gradient)
    )  # [kv_heads, queries, group, head_size]
    for g in range(len(q)):
        yield HeadGroup(q[g].contiguous(), inputs.k[g], inputs.v[g], positions), gradient[g]


def loss_of(change: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Nats a token that a changed output costs to second order; both `[queries, group, head_size]`."""
    return (gradient * change).sum((1, 2)).square().mean() / 2


def layer_costs(
    model: Continued,
    documents: Sequence[Sequence[int]],
    layers: Mapping[int, SplaParameters],
    budgets: Mapping[int, Collection[int]],
    *,
    tail: int,
    queries: int = 96,
    seed: int = 0,
    report: Callable[[], object],
) -> dict[int, dict[int, float]]:
    """What each layer loses under SPLA, all others dense.

    Args:
        model: With its head.
        documents: Token ids.
        layers: What SPLA computes, by layer, whatever its budget.
        budgets: Those to look at, in blocks, by layer.
        tail: Tokens at the end of a document that are looked at; all before are read densely.
        queries: How many of them.
        seed: Of the choice of queries and of the tokens that are drawn.
        report: Called after every layer of every document.

    Returns:
        Nats a token, by layer and budget.
    """
    torch.manual_seed(seed)
    costs = {i: dict.fromkeys(budgets[i], 0.0) for i in layers}
    for tokens in documents:
        start = len(tokens) - tail
        positions = sample_positions(start, len(tokens), queries, seed)
        for inputs, gradient in gradients(model, tokens, start, next(iter(layers.values())).page_size):
            if inputs.layer not in layers:
                continue
            cost = costs[inputs.layer]
            points = {n: Point(replace(layers[inputs.layer], budget_blocks=n)) for n in cost}
            for group, own in head_groups(inputs, gradient, positions):
                for n, point in points.items():
                    change = group.output_change(group.select(point), point.params)
                    cost[n] += loss_of(change, own).item() / len(documents)
            report()
    return costs
