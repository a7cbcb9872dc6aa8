"""Buffers between the launches of a layer, shared by all layers of one geometry: layers run one after another."""

from weakref import WeakValueDictionary

import torch

from ..interface import Pool

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Scratch(dict[str, torch.Tensor]):
    """Buffers by name. They go with the last layer that holds them."""


_shared: WeakValueDictionary[tuple, Scratch] = WeakValueDictionary()


def shared_scratch(shapes: Shapes, device: torch.device, pool: Pool) -> Scratch:
    """The buffers of these shapes, by name.

    Arrival counters start at zero, every launch leaves them so, and they are kept. Nothing else is read before it is
    written, so that it lies in `pool`, whose contents may be lost between steps.
    """
    key = (str(device), pool, *sorted(shapes.items()))
    scratch = _shared.get(key)
    if scratch is None:
        counters = {name: shape for name, shape in shapes.items() if name.endswith("arrivals")}
        scratch = _shared[key] = Scratch(_zeros(counters, device))
        with pool():
            scratch |= _zeros({name: shape for name, shape in shapes.items() if name not in counters}, device)
    return scratch


def _zeros(shapes: Shapes, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(size, dtype=dtype, device=device) for name, (size, dtype) in shapes.items()}
