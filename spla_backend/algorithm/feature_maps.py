"""Feature maps of the linear residual: `phi` turns `[..., head_size]` into `[..., features]`, all positive.

To add one, write a function and decorate it; queries arrive already multiplied by the softmax scale. A GPU needs a
device function too, in `kernels/gpu/feature_maps.py`.
"""

from collections.abc import Callable

import torch

FeatureMap = Callable[[torch.Tensor], torch.Tensor]

REGISTERED: dict[str, FeatureMap] = {}
"""By name; `register_feature_map` adds to it."""


def register_feature_map(name: str) -> Callable[[FeatureMap], FeatureMap]:
    def decorate(phi: FeatureMap) -> FeatureMap:
        REGISTERED[name] = phi
        return phi

    return decorate


def feature_map_names() -> list[str]:
    return sorted(REGISTERED)


def get_feature_map(name: str) -> FeatureMap:
    """The feature map called `name`.

    Raises:
        ValueError: No such feature map; the message names those that exist.
    """
    if name not in REGISTERED:
        raise ValueError(f"unknown feature map {name!r}: choose one of {', '.join(feature_map_names())}")
    return REGISTERED[name]


@register_feature_map("softmax")
def softmax_features(x: torch.Tensor) -> torch.Tensor:
    """Softmax over the feature dimension (RAttention, the paper's choice)."""
    return x.softmax(-1)


@register_feature_map("elu1")
def elu_plus_one(x: torch.Tensor) -> torch.Tensor:
    """`elu(x) + 1` (Katharopoulos et al., arXiv 2006.16236)."""
    return torch.nn.functional.elu(x) + 1
