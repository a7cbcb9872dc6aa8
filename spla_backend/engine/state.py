"""The recurrent state as blocks that the engine owns.

Every SPLA layer registers a companion layer `<layer>.spla_state` whose cache spec makes vLLM's block pool hand each
request `K` blocks of the layer's own page geometry: taken at admission, freed at the end and at preemption, never
prefix-cached, counted with everything else. Their ids are columns `0 .. K-1` of the companion's block table. What
the blocks hold is docs/design.md, 6; whether it is valid is decided where it is read.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import AttentionSpec, CircularBufferSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

STATE_SUFFIX = ".spla_state"


class RecurrentStateManager(CircularBufferManager):
    """Hands every request its `blocks_per_request` state blocks for its whole lifetime.

    A circular buffer of vLLM is one block a request; a float32 state may take more. New blocks hold old bytes and
    need no zeroing: the fold-until-valid rule distrusts them.
    """

    def _claim_ring_block(self, request_id: str, record_for_zeroing: bool = True) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        if blocks:
            return []
        new_blocks = self.block_pool.get_new_blocks(self.kv_cache_spec.blocks_per_request)
        blocks.extend(new_blocks)
        return new_blocks

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        """Blocks that admitting the request takes."""
        return 0 if self.req_to_blocks.get(request_id) else self.kv_cache_spec.blocks_per_request


@register_kv_cache_spec(manager_class=RecurrentStateManager, uniform_type_base_spec=CircularBufferSpec)
@dataclass(frozen=True, kw_only=True)
class RecurrentStateSpec(CircularBufferSpec):
    """Cache spec of a companion layer: `blocks_per_request` blocks with the page geometry of its attention layer."""

    dcp_sharded: bool = False
    blocks_per_request: int

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """Bytes a request holds, whatever its length."""
        return self.blocks_per_request * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: "VllmConfig", max_len: int) -> int:
        """Columns of the block table.

        Model runner V1 computes slot mappings for every group and indexes the table by `position // block_size`,
        so that a narrower table would be read out of bounds.
        """
        return max(self.blocks_per_request, cdiv(max_len, self.block_size))


@dataclass
class RecurrentStateMetadata(AttentionMetadata):
    """State blocks of a batch."""

    block_table: torch.Tensor  # [num_reqs, >= blocks_per_request] int32


class RecurrentStateMetadataBuilder(AttentionMetadataBuilder[RecurrentStateMetadata]):
    """Passes the companion group's block table on."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: "VllmConfig", device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RecurrentStateMetadata:
        """See `AttentionMetadataBuilder.build`."""
        return RecurrentStateMetadata(common_attn_metadata.block_table_tensor)


class RecurrentStateBackend(AttentionBackend):
    """Not an attention backend: the interface through which vLLM asks about the companion's cache."""

    @staticmethod
    def get_name() -> str:
        """See `AttentionBackend.get_name`."""
        return "SPLA_STATE"

    @staticmethod
    def get_impl_cls() -> Any:
        """There is no attention to implement."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[RecurrentStateMetadataBuilder]:
        """See `AttentionBackend.get_builder_cls`."""
        return RecurrentStateMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """As the attention layers': the companion shares their page geometry."""
        return [MultipleOf(16)]


class RecurrentStateLayer(AttentionLayerBase):
    """Companion of one attention layer; registered in the static forward context, never called."""

    def __init__(self, attention_layer: Any) -> None:
        self.attention_layer = attention_layer
        self.kv_cache = torch.tensor([])
        self.is_draft_layer = attention_layer.is_draft_layer

    def get_attn_backend(self) -> type[AttentionBackend]:
        """See `AttentionLayerBase.get_attn_backend`."""
        return RecurrentStateBackend

    def get_kv_cache_spec(self, vllm_config: "VllmConfig") -> RecurrentStateSpec:
        """The attention layer's page geometry with as many blocks a request as its state needs."""
        layer, backend = self.attention_layer, self.attention_layer.get_attn_backend()
        page = backend.customize_spec(layer.get_kv_cache_spec(vllm_config))
        geometry = {field.name: getattr(page, field.name) for field in fields(AttentionSpec)}
        blocks = backend.layouts(page)[1].num_blocks
        return RecurrentStateSpec(**geometry | {"dcp_sharded": False}, blocks_per_request=blocks)


def companion_name(layer_name: str) -> str:
    return layer_name + STATE_SUFFIX
