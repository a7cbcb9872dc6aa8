"""Exact attention over gathered tokens, with its log-sum-exp."""

from collections.abc import Sequence

import torch


def masked_attention(
    logits: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, others: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Softmax attention from logits, and other weighted sums of the same values: one pass over the values for all.

    Args:
        logits: `[..., queries, tokens]`, `q . k`.
        values: `[..., tokens, head_size]`, finite everywhere (invisible tokens included).
        visible: Bool, broadcastable to `logits`; each query sees at least one token.
        others: Further weights, each `[..., any, tokens]`.

    Returns:
        Output `[..., queries, head_size]`, natural-log LSE `[..., queries]`, and each of `others` times the values.
    """
    logits = torch.where(visible, logits, -torch.inf)  # on a CPU a third of the time of masked_fill
    peak = logits.amax(-1, keepdim=True)
    weights = logits.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    parts = [weights, *others]
    products = torch.matmul(torch.cat(parts, -2), values).split([part.shape[-2] for part in parts], -2)
    lse = (peak + total.log()).squeeze(-1)
    return products[0] / total, lse, list(products[1:])
