"""Attention of a transformers model on real text, layer by layer as the model runs: look at it, or replace it."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_serial = itertools.count()  # transformers knows attention functions by name, and each model has its own


@dataclass(frozen=True)
class AttentionInputs:
    """What attention of one layer sees of one document."""

    layer: int
    q: torch.Tensor
    """`[num_heads, length, head_size]`, multiplied by the softmax scale."""
    k: torch.Tensor
    """`[num_kv_heads, length, head_size]`."""
    v: torch.Tensor
    """`[num_kv_heads, length, head_size]`."""


Visit = Callable[[AttentionInputs], torch.Tensor | None]
"""What it returns, if anything, goes on in place of the attention's own output: `[num_heads, length, head_size]`."""


class CapturingModel:
    """A transformers model that shows the inputs of its attention to a visitor.

    Nothing is kept: a visitor takes what it needs while the layer runs, so that memory does not grow with the layers.

    Args:
        model: A local model folder.
        dtype: Dtype of weights and activations.
        device: Where the model runs.
        head: Load the language model head, too, which `logprobs` needs.

    Raises:
        ValueError: There is no such model here.
    """

    def __init__(self, model: str, dtype: torch.dtype = torch.float32, device: str = "cpu", head: bool = False) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoModelForCausalLM
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask

        def attend(
            module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, None]:
            # Layers with a window are not SPLA's.
            if self._visit is not None and not kwargs.get("sliding_window"):
                scale = kwargs.get("scaling")
                scale = query.shape[-1] ** -0.5 if scale is None else scale
                output = self._visit(AttentionInputs(module.layer_idx, query[0] * scale, key[0], value[0]))
                if output is not None:
                    return output.to(query.dtype).transpose(0, 1)[None], None
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

        name = f"spla_capture_{next(_serial)}"
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, sdpa_mask)
        self._visit: Visit | None = None
        try:
            kind = AutoModelForCausalLM if head else AutoModel
            self._model = kind.from_pretrained(model, attn_implementation=name, dtype=dtype, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load {model!r} with transformers: {str(error).splitlines()[0]}") from error
        self._model.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def run(self, tokens: Sequence[int], visit: Visit | None) -> Any:
        """`forward`, for those who differentiate nothing."""
        return self.forward(tokens, visit)

    def forward(self, tokens: Sequence[int], visit: Visit | None) -> Any:
        """Run one document; `visit` is called once for each layer of full attention, in order. Returns what the model
        does. Gradients flow to what the visitor brings in, not to the model's weights."""
        ids = torch.tensor([list(tokens)], device=self._model.device)
        self._visit = visit
        try:
            return self._model(input_ids=ids, use_cache=False)
        finally:
            self._visit = None

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int], visit: Visit | None) -> list[float]:
        """Log-probability of every token but the first, given those before it."""
        logits = self.run(tokens, visit).logits[0, :-1]  # [length - 1, vocabulary]
        wanted = torch.tensor(list(tokens[1:]), device=logits.device)
        pieces = zip(logits.split(1024), wanted.split(1024), strict=True)
        return [x for piece, ids in pieces for x in _log_probability(piece, ids)]


def _log_probability(logits: torch.Tensor, ids: torch.Tensor) -> list[float]:
    return logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0].tolist()
