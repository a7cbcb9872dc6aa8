"""Kernels by device. All implementations share one interface: `plan`, `plan_key`, `run`, `update_cache`,
`page_layout`, `state_layout` (see `cpu/vectorised.TorchPagedSpla`)."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..algorithm.parameters import SplaParameters


@dataclass(frozen=True)
class Limits:
    """The largest step, for scratch that is allocated once."""

    max_num_rows: int
    max_query_len: int
    max_model_len: int
    max_num_tokens: int
    prefill_dense_below: int
    largest_budget: int  # selection blocks, of any layer that selects


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
) -> None:
    """Refuse what the CUDA kernels do not compute, before there is a device to make them on.

    Args:
        params: What to compute.
        num_heads: Query heads.
        num_kv_heads: Kv heads.
        head_size: `d`.
        cache_dtype: Dtype of the cache.
        max_query_len: The most query tokens of a decode row.
        max_model_len: The most tokens of a sequence.
        executor: What attends to the selected pages, see `SplaOptions`.

    Raises:
        ValueError: These parameters, by name.
    """
    from .gpu.decode.steps import _check

    try:
        _check(params, num_heads, num_kv_heads, head_size, cache_dtype, max_query_len, max_model_len, executor)
    except ValueError as error:
        raise ValueError(f"SPLA on a GPU does not compute these options: {error}") from None
    if params.residual == "linear" and head_size > 128:
        raise ValueError(
            f"SPLA's residual 'linear' has no prefill on a GPU for heads of {head_size}, its matrices exceed shared "
            "memory: choose residual 'regression' or 'none'"
        )


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


def make(
    device: torch.device,
    params: SplaParameters,
    limits: Limits,
    *,
    executor: str = "spla",
    dense: bool = False,
    **shape: Any,
) -> Any:
    """The implementation for a device.

    Args:
        device: Where the cache lives.
        params: What to compute.
        limits: The largest step, and which tokens attend to everything.
        executor: What attends to the selected pages in decode, see `SplaOptions`.
        dense: Whether this is one of the layers that attend to everything; its cache is as the others'.
        shape: See `TorchPagedSpla`.

    Raises:
        ValueError: There is none for this device, or not for these parameters.
    """
    if device.type == "cpu":
        check_cpu(executor)
        from .cpu.attention import CpuPagedSpla

        if dense:  # a budget that holds everything
            pages = limits.max_model_len // params.page_size + 1
            params = replace(
                params,
                budget_blocks=max(params.budget_blocks, pages * params.blocks_per_page),
                residual="none",
                combine="shared_normalizer",
                top_p=None,
            )
            shape |= {"gain": None, "norm_weights": None, "feature_weight": None}
        return CpuPagedSpla(params, prefill_dense_below=limits.prefill_dense_below, **shape)
    if device.type == "cuda":
        from .gpu.attention import CudaPagedSpla
        from .gpu.dense_layer import CudaDense

        if shape.pop("feature_weight", None) is not None:
            raise ValueError("SPLA has no CUDA kernels for feature maps with weights: use the CPU engine")
        return (CudaDense if dense else CudaPagedSpla)(
            params, **shape, **vars(limits), executor=executor, device=device
        )
    raise ValueError(f"SPLA has no kernels for device {device.type!r}: use a CPU or a CUDA GPU")
