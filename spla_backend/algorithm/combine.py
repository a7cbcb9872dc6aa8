"""Joining the exact part and the tail (docs/design.md, 4)."""

import torch


def shared_normalizer(
    exact: torch.Tensor, lse: torch.Tensor, tail: torch.Tensor, log_mass: torch.Tensor
) -> torch.Tensor:
    """`(e^lse exact + e^log_mass tail) / (e^lse + e^log_mass)`.

    Args:
        exact: `[..., queries, head_size]`.
        lse: `[..., queries]`.
        tail: `[..., queries, head_size]`, finite.
        log_mass: `[..., queries]`, gain included; -inf where nothing is left, which returns `exact` bit for bit.
    """
    share = torch.sigmoid(log_mass - lse).unsqueeze(-1)
    return torch.where(share > 0, exact + share * (tail - exact), exact)


def with_sinks(exact: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with a learned sink: one more logit a head in the denominator, of a token without a value (gpt-oss,
    arXiv 2508.10925).

    Args:
        exact: `[..., head_size]`.
        lse: `[...]`, log of its denominator.
        sinks: Logits, broadcastable to `lse`.

    Returns:
        Both with the sink.
    """
    return exact * torch.sigmoid(lse - sinks).unsqueeze(-1), torch.logaddexp(lse, sinks)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def double_rmsnorm(
    exact: torch.Tensor, tail: torch.Tensor, exact_weight: torch.Tensor, tail_weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """`RMSNorm_1(exact) + RMSNorm_2(tail)` with per-head weights (RAttention).

    Args:
        exact: `[..., head_size]`.
        tail: `[..., head_size]`, zeros where nothing is left.
        exact_weight: Broadcastable to `exact`.
        tail_weight: Broadcastable to `tail`.
        eps: Added to the mean square.
    """
    return rms_norm(exact, exact_weight, eps) + rms_norm(tail, tail_weight, eps)
