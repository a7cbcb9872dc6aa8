"""Exact attention over gathered tokens, with its log-sum-exp."""

import torch


def masked_attention(
    logits: torch.Tensor, values: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention from logits.

    Args:
        logits: `[..., queries, tokens]`, `q . k`.
        values: `[..., tokens, head_size]`, finite everywhere (invisible tokens included).
        visible: Bool, broadcastable to `logits`; each query sees at least one token.

    Returns:
        Output `[..., queries, head_size]` and natural-log LSE `[..., queries]`.
    """
    logits = logits.masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    return torch.exp(logits - lse.unsqueeze(-1)) @ values, lse
