"""What the launches of a step are bound with, for all layers that are alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..launch import Launch
from ..layer import GpuLayer
from .sizes import PrefillSizes


@dataclass(frozen=True)
class BoundLayer:
    """One of the layers that are alike."""

    layer: GpuLayer
    sizes: PrefillSizes
    scratch: Mapping[str, torch.Tensor]
    own: Mapping[str, torch.Tensor]  # its tensors
    alike: tuple  # what is equal for layers that may share a launch

    @property
    def pages(self) -> dict[str, Any]:
        """Arguments of kernels that read pages."""
        kv = self.own["kv"]
        return {
            "kv_ptr": "kv",
            "page_stride": kv.stride(0),
            "head_stride": kv.stride(1),
            "last_page": len(kv) - 1,
        }

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], constants: Mapping[str, Any]
    ) -> Launch:
        """A `Launch` for all of the layers; arguments as there."""
        return Launch(kernel, grid, arguments, constants, self.alike)
