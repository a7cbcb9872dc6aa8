"""Kernels by device. All implementations share one interface: `plan`, `run`,
`update_cache`, `page_layout`, `state_layout` (see `torch_paged.TorchPagedSpla`)."""

from typing import Any

from ..algorithm.parameters import SplaParameters


def make(device_type: str, params: SplaParameters, **shape: Any) -> Any:
    """The implementation for a device.

    Args:
        device_type: `cpu`, as in `torch.device.type`.
        params: What to compute.
        shape: See `TorchPagedSpla`.

    Raises:
        ValueError: There is none for this device.
    """
    if device_type == "cpu":
        from .torch_paged import TorchPagedSpla

        return TorchPagedSpla(params, **shape)
    raise ValueError(f"SPLA has no kernels for device {device_type!r}: use a CPU or a CUDA GPU")
