"""Random inputs of the tests of selection in two levels and by tiles."""

import torch
from torch import Tensor

from spla_backend.algorithm import reference as ref
from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.selectors import get_selector
from spla_backend.algorithm.statistics_format import decode, encode


def random_qkv(length: int, heads: int, kv_heads: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q `[L, H, d]`, scaled, and k, v `[L, G, d]`; float64."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    return normal(length, heads, d) * 4 / d**0.5, normal(length, kv_heads, d), normal(length, kv_heads, d)


def stored_statistics(k: Tensor, params: SplaParameters) -> Tensor:
    """`reference.complete_statistics`, rounded as `statistics_dtype` stores them."""
    statistics = ref.complete_statistics(k, params)
    if params.statistics_dtype != "fp8":
        return statistics
    formats = get_selector(params.selector).formats(k.shape[-1])
    return decode(encode(statistics, formats), formats).double()
