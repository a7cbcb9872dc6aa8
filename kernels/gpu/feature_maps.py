"""Device functions of the linear residual's feature maps, which turn the `D` elements of a key or query into features.

A feature map that runs on a GPU has its function of tensors in `algorithm/feature_maps.py` and its device function
here, found by the former. Kernels take it as a compile-time constant `PHI`, None where the residual has no feature map.

Plain reference: `reference.apply_feature_map`. The state and what is subtracted from it round features to the cache
dtype in the same way, so that the rounding cancels and the tensor cores can be used.
"""

from typing import Any

import triton
import triton.language as tl

from ...algorithm.feature_maps import FeatureMap, get_feature_map, softmax_features

REGISTERED: dict[FeatureMap, Any] = {}
"""Device functions by the map of tensors; `register_gpu_feature_map` adds to it."""


def register_gpu_feature_map(phi: FeatureMap, function: Any) -> None:
    """Let a feature map run on a GPU.

    Args:
        phi: The map of tensors.
        function: What `triton.jit` made of its device function `(every, some, AXIS)`: features of the elements `some`
            of vectors of which `every` has all, along dimension `AXIS`, float32. It must be 0 where `some` is -inf, as
            are elements beyond the vectors' end.
    """
    REGISTERED[phi] = function


def gpu_feature_map(name: str) -> Any:
    """The device function of the feature map called `name`.

    Raises:
        ValueError: No such feature map, or it has none.
    """
    phi = get_feature_map(name)
    if phi not in REGISTERED:
        raise ValueError(
            f"feature_map {name!r} has no device function: give it one by register_gpu_feature_map "
            "(spla_backend/kernels/gpu/feature_maps.py, where that of softmax is an example), or choose softmax"
        )
    return REGISTERED[phi]


@triton.jit
def _softmax(every, some, AXIS: tl.constexpr):
    top = tl.max(every, axis=AXIS, keep_dims=True)
    norm = tl.sum(tl.exp(every - top), axis=AXIS, keep_dims=True)
    return tl.exp(some - top) / norm


register_gpu_feature_map(softmax_features, _softmax)


@triton.jit
def map_features(PHI: tl.constexpr, x, in_head, AXIS: tl.constexpr):
    """Features of `x` float32 along the head dimension `AXIS`; 0 outside `in_head`."""
    x = tl.where(in_head, x, float("-inf"))
    return PHI(x, x, AXIS)


@triton.jit
def key_features(PHI: tl.constexpr, rows, feature, of_key, column, in_head):
    """Features `[SLICE, TILE]` in the cache dtype of the keys at `rows [TILE]`, of which `feature [SLICE]` names the
    elements; 0 outside `of_key [SLICE]`."""
    every = tl.load(rows[None, :] + column[:, None], mask=in_head[:, None], other=0.0)
    dtype = every.dtype
    every = tl.where(in_head[:, None], every.to(tl.float32), float("-inf"))  # [DP, TILE]
    some = tl.load(rows[None, :] + feature[:, None], mask=of_key[:, None], other=0.0)
    return tl.where(of_key[:, None], PHI(every, some.to(tl.float32), 0).to(dtype), 0.0).to(dtype)
