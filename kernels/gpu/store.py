"""Keys and values of a step into the pages: the launches of `page.update_cache_kernel`."""

from typing import ClassVar

import torch
import triton

from ...algorithm.sketch import CHUNK
from ..layout import new_salt
from .launch import Launch, current_stream, layer_of
from .layer import GpuLayer
from .page import update_cache_kernel

FEW_TOKENS = 128
"""Tokens of a step up to which a program stores one."""
TOKENS = 32
"""Tokens that a program stores in larger steps."""


class Store:
    """Fills the pages of one layer.

    Args:
        layer: Whose.

    Attributes:
        salt: `[2]` int32, random: what the stamps of this layer's pages have in common.
    """

    launches: ClassVar[dict[tuple, Launch]] = {}  # by tokens, and by what layers differ in
    _geometries: ClassVar[dict[tuple, int]] = {}
    _warm: ClassVar[set[int]] = set()

    def __init__(self, layer: GpuLayer) -> None:
        self.layer = layer
        self.salt = new_salt().to(layer.device)
        self._counter = torch.zeros(1, dtype=torch.int32, device=layer.device)
        # Layers of one geometry store by the same launch.
        stored = (layer.device, layer.page_layout, layer.gpu_selector, layer.num_kv_heads, layer.cache_dtype)
        self._geometry = self._geometries.setdefault(stored, len(self._geometries))

    def update_cache(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """See `PagedAttention.update_cache`."""
        num_tokens = slot_mapping.shape[0]
        if num_tokens == 0:
            return
        own = {"key": key, "value": value, "slots": slot_mapping, "kv": kv_cache, "salt": self.salt,
               "counter": self._counter}  # fmt: skip
        addresses, alike = layer_of(own)
        layer = (self._geometry, *alike)
        launch = self.launches.get((num_tokens, layer))
        if launch is None:
            if len(self.launches) >= 64:  # steps of prompts have any number of tokens
                self.launches.clear()
            launch = self._launch(num_tokens, own, layer)
            self.launches[num_tokens, layer] = launch
        addresses["kv_int"] = addresses["kv"]
        launch(addresses, lambda: own | {"kv_int": kv_cache.view(torch.int32)}, current_stream(self.layer.device))

    def _launch(self, num_tokens: int, own: dict[str, torch.Tensor], alike: tuple) -> Launch:
        """Storing so many tokens, for all layers of which `alike` is true."""
        layer, params, block = self.layer, self.layer.params, self.layer.params.selection_block
        key, value, kv_cache = own["key"], own["value"], own["kv"]
        kv_int = kv_cache.view(torch.int32)
        whole = layer.gpu_selector.whole_blocks
        tile = triton.next_power_of_2(block) if whole else min(64, block & -block)  # keys of a block at a time
        columns = max(layer.dp, CHUNK) if params.has_sketch else layer.dp
        tokens = 1 if num_tokens <= FEW_TOKENS else TOKENS  # a program
        return Launch(
            update_cache_kernel,
            (triton.cdiv(num_tokens, tokens), layer.num_kv_heads),
            {
                "key_ptr": "key",
                "value_ptr": "value",
                "slot_ptr": "slots",
                "kv_ptr": "kv",
                "kv_int_ptr": "kv_int",
                "salt_ptr": "salt",
                "counter_ptr": "counter",
                "num_tokens": num_tokens,
                "key_token_stride": key.stride(0),
                "key_head_stride": key.stride(1),
                "value_token_stride": value.stride(0),
                "value_head_stride": value.stride(1),
                "page_stride": kv_cache.stride(0),
                "head_stride": kv_cache.stride(1),
                "int_page_stride": kv_int.stride(0),
                "int_head_stride": kv_int.stride(1),
            },
            {
                "D": layer.head_size,
                "DP": columns,
                "PAGE": params.page_size,
                "UNIT": block,
                "STRIDE": layer.page_layout.statistics_stride,
                "FP8": layer.page_layout.fp8_statistics,
                "SKETCH": layer.page_layout.sketch_begin,
                "TOKENS": tokens,
                "TILE": tile,
                "STAMP_WORD": layer.page_layout.stamp_word,
                "LIMIT": torch.finfo(layer.cache_dtype).max,
                "SELECTOR": layer.gpu_selector,
                "DEPENDENT": layer.dependent,
                "num_warps": 8 if tile * columns > 8192 else 4 if tile * columns >= 4096 else 2,
                **layer.launch_early,
            },
            alike,
        )

    def warm_up(self) -> None:
        """Compile what steps of any number of tokens need, so that no request has to wait for it."""
        if self.layer.device.type != "cuda" or self._geometry in self._warm:
            return
        self._warm.add(self._geometry)
        self.store_padding()
        torch.cuda.synchronize(self.layer.device)

    def store_padding(self) -> None:
        """Store no tokens, as steps of few tokens do and as steps of many."""
        layer = self.layer
        kv_cache = layer.empty_pages(1)
        for num_tokens in (1, FEW_TOKENS + 1):
            tokens = layer.zeros(num_tokens, layer.num_kv_heads, layer.head_size)
            padding = torch.full((num_tokens,), -1, dtype=torch.int64, device=layer.device)
            self.update_cache(tokens, tokens, kv_cache, padding)
