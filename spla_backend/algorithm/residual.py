"""Residual linear attention by subtraction (docs/design.md, 3).

The recurrent state of a sequence sums something over every complete page; what the selected blocks contribute to
the same sums is subtracted for each query, and the difference speaks for the pages that nobody reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from .feature_maps import FeatureMap, get_feature_map
from .parameters import SplaParameters

Reading = tuple[torch.Tensor, ...]
"""What a query reads from a state, each part linear in the state and `[..., queries or 1, head_size or 1]`."""

BlockReader = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Sum of `q S_b` over the blocks chosen for each query, of features `[rows, queries, features]`, sums `[rows, blocks,
features, head_size]` and a choice `[rows, queries, blocks]`: a faster form of what `read_blocks` does in torch."""


class Residual(ABC):
    """What is summed into the state, and how a query reads it.

    A state is `S [..., s_rows, head_size]` and `z [..., z_size]`, float32, leading dimensions usually
    `[rows, kv_heads]`. Everything a query reads is linear in the state, so that a reading of the rest is the reading
    of the state minus that of the selected tokens.
    """

    s_rows: int
    z_size: int
    """Also the number of features."""

    @abstractmethod
    def contribution(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What tokens `[..., tokens, head_size]` add to `S` and `z`."""

    def block_contributions(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each of the blocks `[..., blocks, block_size, head_size]` adds to `S` and `z`."""
        return self.contribution(keys, values)

    def query_features(self, q: torch.Tensor) -> torch.Tensor:
        """What `S` is multiplied with, `[..., queries, features]` of scaled queries `[..., queries, head_size]`."""
        return q

    @abstractmethod
    def read_sums(self, features: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> Reading:
        """The other parts of a reading, arguments as in `read` but for the features of the queries."""

    def read(self, q: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> Reading:
        """Reading of `n` states side by side: features times the first rows of `S`, and what `read_sums` adds.

        Args:
            q: Scaled queries `[..., queries, head_size]`.
            s: `[..., s_rows, n * head_size]`.
            z: `[..., z_size, n]`.

        Returns:
            Parts `[..., queries or 1, n * head_size or n]`.
        """
        features = self.query_features(q)
        return features @ s[..., : features.shape[-1], :], *self.read_sums(features, s, z)

    @abstractmethod
    def token_weights(
        self, q: torch.Tensor, keys: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor
    ) -> list[torch.Tensor]:
        """What the values of some tokens are multiplied with to read the state of these tokens without making it.

        Args:
            q: Scaled queries `[..., queries, head_size]`.
            keys: `[..., tokens, head_size]`, finite everywhere.
            logits: `[..., queries, tokens]`, `q . k`.
            mask: Bool `[..., 1 or queries, tokens]`, the tokens that count.

        Returns:
            Weights `[..., queries or 1, tokens]`, zero where the mask is; for `reading`.
        """

    @abstractmethod
    def reading(self, weights: list[torch.Tensor], products: list[torch.Tensor]) -> Reading:
        """Reading of the state of some tokens.

        Args:
            weights: From `token_weights`.
            products: Each of the weights times the values of the tokens, `[..., queries or 1, head_size]`.
        """

    def read_tokens(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> Reading:
        """Reading of the state of some tokens, arguments as in `token_weights`; values are finite everywhere."""
        weights = self.token_weights(q, keys, q @ keys.mT, mask)
        return self.reading(weights, [w @ values for w in weights])

    def read_blocks(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        chosen: torch.Tensor,
        reader: BlockReader | None = None,
    ) -> Reading:
        """As `read_tokens` by whole blocks, for many queries: no tensor of the size of the logits is masked.

        What each query reads of each block is made and summed, but for the products with `S` where `reader` makes them.

        Args:
            q: Scaled queries `[..., queries, head_size]`.
            keys: `[..., blocks, block_size, head_size]`, finite everywhere.
            values: `[..., blocks, block_size, head_size]`, finite everywhere.
            chosen: Bool `[..., queries, blocks]`.
            reader: What multiplies with `S`, with one leading dimension; None for torch.
        """
        if chosen.shape[-1] == 0:
            return self.read_tokens(q, keys.flatten(-3, -2), values.flatten(-3, -2), chosen)
        s, z = self.block_contributions(keys, values)  # [..., blocks, s_rows, head_size], [..., blocks, z_size]
        blocks = keys.shape[-3]
        weight = chosen.to(q.dtype)  # [..., queries, blocks]
        side_by_side = s.movedim(-3, -2).flatten(-2), z.mT  # [..., s_rows, blocks * head_size], [..., z_size, blocks]
        parts = []
        if reader is None:
            read = self.read(q, *side_by_side)
        else:
            features = self.query_features(q)
            parts.append(reader(features, s[..., : features.shape[-1], :], chosen))
            read = self.read_sums(features, *side_by_side)
        for part in read:
            part = part.unflatten(-1, (blocks, -1))  # [..., queries or 1, blocks, size]
            if part.shape[-1] == 1:
                parts.append((weight * part.squeeze(-1)).sum(-1, keepdim=True))
            elif part.shape[-3] == 1:
                parts.append(weight @ part.squeeze(-3))
            else:
                parts.append((weight.unsqueeze(-2) @ part).squeeze(-2))
        return tuple(parts)

    @abstractmethod
    def tail(self, rest: Reading, num_rest: torch.Tensor) -> torch.Tensor:
        """The tail's output `[..., queries, head_size]` from a reading of the rest, `num_rest [..., queries]` tokens;
        finite but meaningless where `num_rest` is 0 (the caller gates)."""


class RegressionResidual(Residual):
    """`phi(k) = [k, 1]`: the tail's mean value plus a share of its covariance with the keys.

    Expanding the softmax over the rest to first order gives `v_bar + Cov(v, k) q`; `scale` shrinks the second term, by
    a number or a tensor that is broadcastable to the output. A reading is `(sum (q . k) v, sum v, sum q . k)`.
    """

    def __init__(self, head_size: int, scale: float | torch.Tensor) -> None:
        self.s_rows, self.z_size, self.scale = head_size + 1, head_size, scale

    def contribution(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = torch.cat([keys.mT @ values, values.sum(-2, keepdim=True)], -2)
        return s, keys.sum(-2)

    def read_sums(self, features: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> Reading:
        return s[..., -1:, :], features @ z

    def token_weights(
        self, q: torch.Tensor, keys: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor
    ) -> list[torch.Tensor]:
        return [torch.where(mask, logits, 0.0), mask.to(logits.dtype)]

    def reading(self, weights: list[torch.Tensor], products: list[torch.Tensor]) -> Reading:
        return products[0], products[1], weights[0].sum(-1, keepdim=True)

    def tail(self, rest: Reading, num_rest: torch.Tensor) -> torch.Tensor:
        qkv, v, qk = rest
        share = num_rest.clamp(min=1).reciprocal().unsqueeze(-1)
        v_bar = v * share
        covariance = torch.addcmul(qkv, qk, v_bar, value=-1)  # times the count
        if isinstance(self.scale, torch.Tensor):
            return torch.addcmul(v_bar, covariance, share * self.scale)
        return torch.addcmul(v_bar, covariance, share, value=self.scale)


class LinearResidual(Residual):
    """The paper's linear attention: `phi(q) S`, divided by `phi(q) . z` where `normalized`.

    Args:
        head_size: `d`.
        phi: The feature map.
        normalized: Whether to divide.
        weight: What queries and keys are multiplied with before the feature map, `[kv_heads, d, d]`; None for neither.
    """

    def __init__(self, head_size: int, phi: FeatureMap, normalized: bool, weight: torch.Tensor | None = None) -> None:
        self._phi, self.normalized, self.weight = phi, normalized, weight
        self.s_rows = self.z_size = phi(torch.zeros(head_size)).shape[-1]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Of queries or keys `[..., rows * kv_heads, n, head_size]`."""
        if self.weight is None:
            return self._phi(x)
        by_head = x.unflatten(-3, (-1, self.weight.shape[0]))  # [..., rows, kv_heads, n, head_size]
        return self._phi((by_head @ self.weight).flatten(-4, -3))

    def contribution(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(keys)
        return features.mT @ values, features.sum(-2)

    def block_contributions(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(keys.flatten(-3, -2)).unflatten(-2, keys.shape[-3:-1])
        return features.mT @ values, features.sum(-2)

    def query_features(self, q: torch.Tensor) -> torch.Tensor:
        return self.features(q)

    def read_sums(self, features: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> Reading:
        return (features @ z,)

    def token_weights(
        self, q: torch.Tensor, keys: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor
    ) -> list[torch.Tensor]:
        return [torch.where(mask, self.features(q) @ self.features(keys).mT, 0.0)]

    def reading(self, weights: list[torch.Tensor], products: list[torch.Tensor]) -> Reading:
        return products[0], weights[0].sum(-1, keepdim=True)

    def tail(self, rest: Reading, num_rest: torch.Tensor) -> torch.Tensor:
        numerator, normalizer = rest
        if not self.normalized:
            return numerator
        return numerator / normalizer.clamp(min=torch.finfo(numerator.dtype).tiny)


def make_residual(
    params: SplaParameters, head_size: int, feature_weight: torch.Tensor | None = None
) -> Residual | None:
    """The residual that `params` name, or None; `feature_weight [kv_heads, d, d]` is for `linear` alone."""
    if params.residual == "none":
        return None
    if params.residual == "regression":
        return RegressionResidual(head_size, params.residual_scale)
    return LinearResidual(
        head_size, get_feature_map(params.feature_map), params.combine == "shared_normalizer", feature_weight
    )
