"""Let a draft model read its own group's block table where the target's layers are not all in one group.

Upstream cause, vLLM 0.32 and 0.33: `GPUModelRunner._build_attention_metadata` (of the V1 runner, which the CPU engine
uses) picks the drafter's own cache group for EAGLE, MTP, DFlash, Gemma 4 and the extraction of hidden states, and hands
every other drafter the tables of group 0. A draft model whose layers are in another group then reads and writes the
target's blocks as its own: no draft is accepted, and the target's answers are wrong. The blocks of SPLA's recurrent
state are a group, and with it there are several.

Remove when `DraftModelProposer` is among the drafters that `_build_attention_metadata` asks for their `kv_cache_gid`.
"""

import functools
from typing import Any

WHERE = "draft models in vLLM's V1 model runner"
INTERFACES = (
    "vllm.v1.attention.backend:CommonAttentionMetadata.num_actual_tokens",
    "vllm.v1.attention.backend:CommonAttentionMetadata.slot_mapping",
    "vllm.v1.spec_decode.draft_model:DraftModelProposer",
    "vllm.v1.worker.block_table:BlockTable.get_device_tensor(num_reqs)",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata(slot_mappings)",
)


def apply() -> None:
    """Wrap a method of the V1 model runner; a second call does nothing."""
    from vllm.v1.spec_decode.draft_model import DraftModelProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._build_attention_metadata
    if getattr(original, "_spla", False):
        return

    @functools.wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        metadata, common = original(self, *args, **kwargs)
        drafter = getattr(self, "drafter", None)
        if common is not None and isinstance(drafter, DraftModelProposer):
            group = drafter.kv_cache_gid
            common.block_table_tensor = self.input_batch.block_table[group].get_device_tensor(common.num_reqs)
            common.slot_mapping = kwargs["slot_mappings"][group][: common.num_actual_tokens]
        return metadata, common

    build._spla = True  # type: ignore[attr-defined]
    GPUModelRunner._build_attention_metadata = build
