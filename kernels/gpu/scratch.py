"""Buffers between the launches of a layer, shared by all layers of one geometry: layers run one after another."""

import torch

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]

_shared: dict[tuple, dict[str, torch.Tensor]] = {}


def shared_scratch(shapes: Shapes, device: torch.device) -> dict[str, torch.Tensor]:
    """The buffers of these shapes, by name.

    Arrival counters among them start at zero and every launch leaves them so; nothing else is read before it is
    written.
    """
    key = (str(device), *sorted(shapes.items()))
    if key not in _shared:
        _shared[key] = {name: torch.zeros(size, dtype=dtype, device=device) for name, (size, dtype) in shapes.items()}
    return _shared[key]


def forget_scratch() -> None:
    """Layers that are made from now on get buffers of their own; those of others go with the last of these."""
    _shared.clear()
