"""Residual linear attention by subtraction (docs/design.md, 3).

The recurrent state of a sequence sums something over every complete page; what the selected blocks contribute to
the same sums is subtracted for each query, and the difference speaks for the pages that nobody reads.
"""

from abc import ABC, abstractmethod

import torch

from .feature_maps import FeatureMap, get_feature_map
from .parameters import SplaParameters


class Residual(ABC):
    """What is summed into the state, and how a query reads it.

    A state is `S [..., s_rows, head_size]` and `z [..., z_size]`, float32, leading dimensions usually
    `[rows, kv_heads]`.
    """

    s_rows: int
    z_size: int

    @abstractmethod
    def contribution(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What tokens `[..., tokens, head_size]` add to `S` and `z`."""

    @abstractmethod
    def tail(
        self,
        q: torch.Tensor,
        logits: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        subtract: torch.Tensor,
        s: torch.Tensor,
        z: torch.Tensor,
        num_rest: torch.Tensor,
    ) -> torch.Tensor:
        """The tail's output for each query; meaningless where `num_rest` is 0 (the caller gates).

        Args:
            q: Scaled queries `[..., queries, head_size]`.
            logits: `q . k` of the gathered tokens, `[..., queries, tokens]`: the exact part has them already.
            keys: Gathered keys `[..., tokens, head_size]`, finite everywhere.
            values: Gathered values `[..., tokens, head_size]`, finite everywhere.
            subtract: `[..., queries, tokens]` bool, selected tokens of complete pages.
            s: `[..., s_rows, head_size]`.
            z: `[..., z_size]`.
            num_rest: `[..., queries]` tokens left over.

        Returns:
            `[..., queries, head_size]`.
        """


class RegressionResidual(Residual):
    """`phi(k) = [k, 1]`: the tail's mean value plus a share of its covariance with the keys.

    Expanding the softmax over the rest to first order gives `v_bar + Cov(v, k) q`; `scale` shrinks the second term.
    """

    def __init__(self, head_size: int, scale: float) -> None:
        self.s_rows, self.z_size, self.scale = head_size + 1, head_size, scale

    def contribution(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = torch.cat([keys.mT @ values, values.sum(-2, keepdim=True)], -2)
        return s, keys.sum(-2)

    def tail(self, q, logits, keys, values, subtract, s, z, num_rest):  # noqa: D102
        subtracted = subtract.to(q.dtype)
        selected_logits = logits.masked_fill(~subtract, 0.0)
        n = num_rest.clamp(min=1).unsqueeze(-1)
        qk = ((q @ z.unsqueeze(-1)) - selected_logits.sum(-1, keepdim=True)) / n  # [..., queries, 1]
        v_bar = (s[..., -1:, :] - subtracted @ values) / n  # [..., queries, head_size]
        qkv = (q @ s[..., :-1, :] - selected_logits @ values) / n
        return v_bar + self.scale * (qkv - qk * v_bar)


class LinearResidual(Residual):
    """The paper's linear attention: `phi(q) S`, divided by `phi(q) . z` where `normalized`."""

    def __init__(self, head_size: int, phi: FeatureMap, normalized: bool) -> None:
        self.phi, self.normalized = phi, normalized
        self.s_rows = self.z_size = phi(torch.zeros(head_size)).shape[-1]

    def contribution(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.phi(keys)
        return features.mT @ values, features.sum(-2)

    def tail(self, q, logits, keys, values, subtract, s, z, num_rest):  # noqa: D102
        phi_q = self.phi(q)
        weights = (phi_q @ self.phi(keys).mT).masked_fill(~subtract, 0.0)
        out = phi_q @ s - weights @ values
        if not self.normalized:
            return out
        normalizer = phi_q @ z.unsqueeze(-1) - weights.sum(-1, keepdim=True)
        return out / normalizer.clamp(min=torch.finfo(q.dtype).tiny)


def make_residual(params: SplaParameters, head_size: int) -> Residual | None:
    """The residual that `params` name, or None."""
    if params.residual == "none":
        return None
    if params.residual == "regression":
        return RegressionResidual(head_size, params.residual_scale)
    return LinearResidual(head_size, get_feature_map(params.feature_map), params.combine == "shared_normalizer")
