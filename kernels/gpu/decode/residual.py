"""The residual of a decode step: what is subtracted from the state beside the attention, and the tail that is left.

Plain reference: `reference.residual_direction`. Source: SPLA (arXiv 2601.22379), residual linear attention by
subtraction.
"""

import triton
import triton.language as tl

from ..residual import REGRESSION


@triton.jit
def subtract_weights(feature, kind, covered, dtype: tl.constexpr):
    """What selected tokens weigh in the columns that are subtracted, `[TILE, N]` in `dtype`.

    Args:
        feature: `phi(q) . phi(k)` `[TILE, N]` float32.
        kind: Of a column, `[1, N]`: 1 the high part of the feature, 2 its low part, 3 ones. Two numbers of the cache
            dtype keep the digits of `state - selected`.
        covered: `[TILE, 1]`, tokens that the state covers.
        dtype: Of the values.
    """
    high = feature.to(dtype)
    low = (feature - high.to(tl.float32)).to(dtype)
    weight = tl.where(kind == 1, high, tl.where(kind == 2, low, tl.where(kind == 3, 1.0, 0.0).to(dtype)))
    return tl.where(covered, weight, 0.0).to(dtype)


@triton.jit
def tail_of_rest(
    minus, minus_z, minus_v, num_tokens, residual_scale, RESIDUAL: tl.constexpr, DOUBLE_NORM: tl.constexpr
):  # fmt: skip
    """The tail `[C, DP]` from selected - all of `phi(q) S` `[C, DP]`, of `phi(q) . z` `[C]`, and of the sum of the
    values `[DP]`; `num_tokens` are left out."""
    if RESIDUAL == REGRESSION:
        scaled = 1.0 / tl.maximum(num_tokens, 1).to(tl.float32)
        mean_v = -minus_v * scaled
        mean_qk = -minus_z * scaled
        covariance = -minus * scaled - mean_qk[:, None] * mean_v[None, :]
        tail = mean_v[None, :] + residual_scale * covariance
    elif DOUBLE_NORM:
        tail = -minus
    else:
        tail = -minus / tl.maximum(-minus_z, 1e-30)[:, None]
    return tail
