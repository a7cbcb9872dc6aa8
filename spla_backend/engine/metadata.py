"""Metadata of a step: what block selection and attention need, made once for all layers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from .impl import SplaImpl

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class SplaMetadata(AttentionMetadata):
    """One step of one group of layers."""

    plans: dict[Any, Any]
    """What the kernels planned for this step, by their `plan_key`; see `spla_backend.kernels`."""


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
        for impl in impls:
            impl.bind(kv_cache_spec.block_size, kv_cache_spec.dtype, device)
        self.ops = {impl.op.plan_key: impl.op for impl in impls}  # any layer's of each kind

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SplaMetadata:
        """See `AttentionMetadataBuilder.build`."""
        common = common_attn_metadata
        split = {} if self.device.type == "cpu" else self._split(common)
        batch = common.query_start_loc, common.seq_lens, common.block_table_tensor
        return SplaMetadata({key: op.plan(*batch, **split) for key, op in self.ops.items()})

    def _split(self, common: CommonAttentionMetadata) -> dict[str, Any]:
        """Decode rows, which vLLM puts first, and prefill rows, from what the host knows."""
        threshold = self.reorder_batch_threshold
        assert threshold is not None
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=threshold, require_uniform=True
        )
        prefill_lens: list[int] = []
        if num_prefills:
            if common.seq_lens_cpu_upper_bound is None:
                raise RuntimeError(
                    "SPLA plans prefill on the host and this model runner does not say how long the sequences are: "
                    "use vLLM's own model runner"
                )
            # Exact for rows of a prefill.
            prefill_lens = common.seq_lens_cpu_upper_bound[num_decodes : common.num_reqs].tolist()
        return {
            "prefill_starts": common.query_start_loc_cpu[num_decodes : common.num_reqs + 1].tolist(),
            "prefill_lens": prefill_lens,
            "num_decodes": num_decodes,
            "num_decode_tokens": num_decode_tokens,
            # Rows of a mixed batch may be shorter than a verification row, never longer.
            "decode_query_len": threshold if num_prefills else min(threshold, common.max_query_len),
        }
