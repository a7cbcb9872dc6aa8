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

    # vLLM replays full graphs for steps of `1 + k` tokens in every row, padded by rows of none. Where drafts were cut
    # off, attention is launched between piecewise graphs, or all is launched as without graphs.
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
        """Decode rows, which vLLM puts first: up to the first of more than `1 + k` query tokens, with `k` drafts.

        They are tokens that are generated, with as many drafts as were not cut off, and ends of prompts. Only the
        device knows how long their sequences are: with asynchronous scheduling, the host takes all drafts of the step
        before for accepted. The other rows are prefill rows.
        """
        threshold = self.reorder_batch_threshold
        assert threshold is not None
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(common, decode_threshold=threshold)
        prefill_lens = self._prefill_lens(common, num_decodes, threshold) if num_prefills else []
        return Step(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            # One of the two for which kernels are compiled at the start.
            decode_query_len=1 if common.max_query_len == 1 else threshold,
            prefill_starts=common.query_start_loc_cpu[num_decodes : common.num_reqs + 1].tolist(),
            prefill_lens=prefill_lens,
        )

    @staticmethod
    def _prefill_lens(common: CommonAttentionMetadata, num_decodes: int, threshold: int) -> list[int]:
        """Tokens of the sequences of the rows behind the decode rows, exactly.

        The host knows them where no draft of the row's step before may have been rejected. It knows those of a row of
        more than `threshold` query tokens, which is of a prompt or of what is computed again after preemption, and
        those of prompts however short. Other rows stand behind a prefill row only where another backend of the model
        wants the batch in another order (vLLM's V1 model runner); then the host waits for the device.
        """
        rows = slice(num_decodes, common.num_reqs)
        query_lens = common.query_start_loc_cpu.diff()[rows]
        known = (query_lens > threshold) | (query_lens == 0)
        if common.is_prefilling is not None:
            known |= common.is_prefilling[rows]
        bound = common.seq_lens_cpu_upper_bound
        return (common.seq_lens if bound is None or not bool(known.all()) else bound)[rows].tolist()
