"""Plans a step: what block selection and attention need, made once for all layers."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from ..kernels.interface import PagedAttention, Step
from .impl import SplaImpl
from .metadata import SplaMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class SplaMetadataBuilder(AttentionMetadataBuilder[SplaMetadata]):
    """Plans block selection, page tables and recurrent states of a step."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: "VllmConfig", device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        impls = [layer.impl for layer in layers.values() if isinstance(layer.impl, SplaImpl)]
        # Only now are page size, cache dtype and memory limits final.
        ops = [impl.bind(kv_cache_spec.block_size, kv_cache_spec.dtype, device) for impl in impls]
        self.ops: dict[Hashable, PagedAttention] = {op.plan_key: op for op in ops}  # any layer's of each kind

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SplaMetadata:
        """See `AttentionMetadataBuilder.build`."""
        step = self._step(common_attn_metadata)
        return SplaMetadata({key: op.plan(step) for key, op in self.ops.items()})

    def _step(self, common: CommonAttentionMetadata) -> Step:
        """Decode rows, which vLLM puts first, and prefill rows, from what the host knows."""
        threshold = self.reorder_batch_threshold
        assert threshold is not None
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=threshold, require_uniform=True
        )
        prefill_lens: list[int] = []
        if num_prefills:
            # Exact for rows of a prefill.
            seq_lens = common.seq_lens if self.device.type == "cpu" else common.seq_lens_cpu_upper_bound
            if seq_lens is None:
                raise RuntimeError(
                    "SPLA plans prefill on the host and this model runner does not say how long the sequences are: "
                    "use vLLM's own model runner"
                )
            prefill_lens = seq_lens[num_decodes : common.num_reqs].tolist()
        return Step(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            # Rows of a mixed batch may be shorter than a verification row, never longer.
            decode_query_len=threshold if num_prefills else min(threshold, common.max_query_len),
            prefill_starts=common.query_start_loc_cpu[num_decodes : common.num_reqs + 1].tolist(),
            prefill_lens=prefill_lens,
        )
