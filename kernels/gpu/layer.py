"""One layer as the launches of a GPU see it: what storing, decode, prefill and dense attention have in common."""

from contextlib import nullcontext

import torch
import triton

from ...algorithm.parameters import SplaParameters, check_sinks
from ...algorithm.selectors import get_selector
from ..interface import Layer, Pool
from ..layout import layouts
from .capability import has_tensor_memory, is_narrow
from .checks import check_capability, check_layer
from .feature_maps import gpu_feature_map
from .selectors import gpu_selector

INTERPRETED_SMS = 132
INTERPRETED_CAPABILITY = (9, 0)
"""Multiprocessors and compute capability that launch shapes are made for where kernels are interpreted: those of an
H200, so that a machine without a GPU tests the launches that were measured."""


class GpuLayer:
    """Parameters, layouts, weights on the device, and the sizes that kernels are specialised for.

    Args:
        params: What to compute.
        layer: Of which layer; its cache is fp16 or bf16.
        device: Where the cache lives.
        scratch_pool: Where scratch lies, see `dispatch.make`.

    Attributes:
        page_layout: Bytes of a page.
        state_layout: Bytes of a state block.
        group: Query heads a kv head.
        gain: `[H]` float32, weight of the tail.
        sinks: `[H]`, the model's own parameter of any dtype, read by every launch; None without sinks.
        sink_dtype: Its dtype.
        score_sinks: The same, where the heads' sums of scores are sums of masses, which the sinks are added to.
        norm_weights: Exact and tail `[H, d]` float32, of the double RMSNorm.
        top_p: 0 where there is none.
        selector: The selector's class, for its traits.
        gpu_selector: Its device functions.
        phi: Device function of the linear residual's feature map; None for other residuals.
        has_mass: Whether the mass of what is not selected is asked for.
        own_mass: Whether it is, and is another number than the score.
        dp: `head_size`, padded to a power of two.
        group_p: `group`, padded to a power of two.
        fold_tile: Tokens that a state is folded by at a time.
        num_sms: Multiprocessors of the GPU.
        capability: Its compute capability.
        narrow: Whether its thread blocks have little shared memory.
        tensor_memory: Whether it sums matrix products in tensor memory.
        dependent: Whether kernels are launched while the ones before them still run.
        launch_early: What a dependent launch is given.

    Raises:
        ValueError: Parameters that no kernel covers.
    """

    def __init__(
        self, params: SplaParameters, layer: Layer, device: torch.device | str, scratch_pool: Pool = nullcontext
    ) -> None:
        if layer.sinks is not None:
            check_sinks(params.combine)
        check_layer(params, layer.num_heads, layer.num_kv_heads, layer.head_size, layer.cache_dtype)
        self.params, self.device, self.scratch_pool = params, torch.device(device), scratch_pool
        self.num_heads, self.num_kv_heads, self.head_size = layer.num_heads, layer.num_kv_heads, layer.head_size
        self.group = layer.num_heads // layer.num_kv_heads
        self.cache_dtype, self.scale = layer.cache_dtype, float(layer.scale)
        self.page_layout, self.state_layout = layouts(params, layer.head_size, layer.cache_dtype)
        gain = torch.ones(layer.num_heads) if layer.gain is None else layer.gain
        ones = torch.ones(layer.num_heads, layer.head_size)
        exact, tail = (ones, ones) if layer.norm_weights is None else layer.norm_weights
        self.gain = self._weight(gain)
        self.sinks, self.sink_dtype = layer.sinks, None if layer.sinks is None else layer.sinks.dtype
        self.norm_weights = self._weight(exact), self._weight(tail)
        self.top_p = params.top_p if params.top_p is not None and params.top_p < 1 else 0.0
        self.selector, self.gpu_selector = get_selector(params.selector), gpu_selector(params.selector)
        self.score_sinks = layer.sinks if self.selector.has_mass else None
        self.phi = gpu_feature_map(params.feature_map) if params.residual == "linear" else None
        self.has_mass = params.residual != "none" and params.combine == "shared_normalizer"
        self.own_mass = self.has_mass and not self.selector.score_is_mass
        self.dp = triton.next_power_of_2(layer.head_size)
        self.group_p = triton.next_power_of_2(self.group)
        self.fold_tile = min(64, params.page_size & -params.page_size)
        self.num_sms, self.capability, self.dependent = INTERPRETED_SMS, INTERPRETED_CAPABILITY, False
        if self.device.type == "cuda":
            self.num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
            self.capability = torch.cuda.get_device_capability(self.device)
            self.dependent = self.capability[0] >= 9
        check_capability(self.capability)
        self.narrow, self.tensor_memory = is_narrow(self.capability), has_tensor_memory(self.capability)
        self.launch_early = {"launch_pdl": True} if self.dependent else {}

    def _weight(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(device=self.device, dtype=torch.float32).contiguous()

    def zeros(self, *shape: int) -> torch.Tensor:
        """Keys, values, queries or outputs for a warm-up."""
        return torch.zeros(shape, dtype=self.cache_dtype, device=self.device)

    def empty_pages(self, num_pages: int) -> torch.Tensor:
        """A cache for a warm-up, `[num_pages, G, rows, 2 d]`."""
        return self.zeros(num_pages, self.num_kv_heads, self.page_layout.rows, 2 * self.head_size)
