"""Kernels by device: `make` gives every layer its implementation of `PagedAttention`."""

from contextlib import nullcontext

import torch

from ..algorithm.parameters import SplaParameters
from .interface import Layer, Limits, PagedAttention, Pool


def dense_below(device: torch.device, chosen: int | None, params: SplaParameters, max_model_len: int) -> int:
    """Position below which prompt tokens attend to everything, in all layers alike.

    Args:
        device: Where the cache lives.
        chosen: What the user wants; None for the device's habit.
        params: What layers without a budget of their own compute.
        max_model_len: The most tokens of a sequence.
    """
    if chosen is not None:
        return chosen
    if device.type == "cpu":
        return 0
    from .gpu.attention import default_dense_below

    return default_dense_below(params, max_model_len)


def check_cpu(executor: str) -> None:
    """Raises:
    ValueError: An executor that runs on a GPU only.
    """
    if executor != "spla":
        raise ValueError(f"SPLA option executor {executor!r} needs a CUDA GPU: leave it at 'spla' on a CPU")


def check_cuda(
    params: SplaParameters,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    cache_dtype: torch.dtype,
    max_query_len: int,
    max_model_len: int,
    executor: str,
    capability: tuple[int, int] | None,
) -> None:
    """Refuse what the kernels of a GPU do not compute, before there is a device to make them on; see `gpu/checks.py`.

    Raises:
        ValueError: These parameters, or this GPU, by name.
    """
    from .gpu.checks import check_options

    check_options(
        params,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        cache_dtype=cache_dtype,
        max_query_len=max_query_len,
        max_model_len=max_model_len,
        executor=executor,
        capability=capability,
    )


def make(
    device: torch.device,
    params: SplaParameters,
    layer: Layer,
    limits: Limits,
    *,
    executor: str = "spla",
    dense: bool = False,
    scratch_pool: Pool = nullcontext,
) -> PagedAttention:
    """The implementation for a device.

    Args:
        device: Where the cache lives.
        params: What to compute.
        layer: Of which layer.
        limits: The largest step, and which tokens attend to everything.
        executor: What attends to the selected pages in decode, see `SplaOptions`.
        dense: Whether this is one of the layers that attend to everything; its cache is as the others'.
        scratch_pool: On a GPU where scratch lies, whose contents may be lost between steps; those of all else that is
            allocated here, and all addresses, must be kept.

    Raises:
        ValueError: There is none for this device, or not for these parameters.
    """
    if (params.tile, params.coarse_tile, params.fine_dtype) != (1, 1, "auto"):
        raise ValueError(
            f"no kernel lets tiles of {params.tile} prompt tokens share a selection or {params.coarse_tile} their "
            f"candidates, or rounds what ranks fine blocks to {params.fine_dtype}: set tile to 1, candidate_tile to 0 "
            "and fine_dtype to 'auto'"
        )
    if device.type == "cpu":
        check_cpu(executor)
        from .cpu.attention import CpuAttention, dense_layer

        return dense_layer(params, layer, limits) if dense else CpuAttention(params, layer, limits.prefill_dense_below)
    if device.type == "cuda":
        from .gpu.attention import GpuAttention
        from .gpu.dense_layer import GpuDenseAttention

        if layer.feature_weight is not None:
            raise ValueError("SPLA has no CUDA kernels for feature maps with weights: use the CPU engine")
        if dense:
            return GpuDenseAttention(params, layer, limits, device)
        return GpuAttention(params, layer, limits, device, executor, scratch_pool)
    raise ValueError(f"SPLA has no kernels for device {device.type!r}: use a CPU or a CUDA GPU")
