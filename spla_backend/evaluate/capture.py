"""Attention of a transformers model on real text, layer by layer as the model runs: look at it, or replace it."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

_serial = itertools.count()  # transformers knows attention functions by name, and each model has its own

_QUERIES = 512  # whose mask is made at a time where a layer has one
_LOGITS = 1 << 26  # elements that are held at a time


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
        from transformers.masking_utils import causal_mask_function, sdpa_mask

        def attend(
            module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, None]:
            if kwargs.get("s_aux") is not None:
                raise ValueError(
                    f"{type(module).__name__} has learned attention sinks, which transformers' SDPA, with which models "
                    "are looked into and calibrated here, leaves out: only what runs vLLM (`spla-eval perplexity`, "
                    "`tasks`) takes such a model"
                )
            scale = kwargs.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            window = kwargs.get("sliding_window")
            # Layers with a window are not SPLA's.
            if self._visit is not None and not window:
                output = self._visit(AttentionInputs(module.layer_idx, query[0] * scale, key[0], value[0]))
                if output is not None:
                    return output.to(query.dtype).transpose(0, 1)[None], None
            if callable(attention_mask):
                return _attend_in_pieces(query, key, value, attention_mask, scale, window).transpose(1, 2), None
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

        def mask(
            batch_size: int,
            q_length: int,
            kv_length: int,
            q_offset: int = 0,
            kv_offset: int = 0,
            mask_function: Any = causal_mask_function,
            **kwargs: Any,
        ) -> Any:
            if int(q_offset) or kv_offset or q_length != kv_length:
                return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, **kwargs)
            # Of a whole document, `attend` makes the mask itself: at 32768 tokens it would take gigabytes.
            return None if mask_function is causal_mask_function else mask_function

        name = f"spla_capture_{next(_serial)}"
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, mask)
        self._visit: Visit | None = None
        try:
            kind = AutoModelForCausalLM if head else AutoModel
            self.model = kind.from_pretrained(model, attn_implementation=name, dtype=dtype, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load {model!r} with transformers: {str(error).splitlines()[0]}") from error
        self.model.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def run(self, tokens: Sequence[int], visit: Visit | None) -> Any:
        """`forward`, for those who differentiate nothing."""
        return self.forward(tokens, visit)

    def forward(self, tokens: Sequence[int], visit: Visit | None) -> Any:
        """Run one document; `visit` is called once for each layer of full attention, in order. Returns what the model
        does. Gradients flow to what the visitor brings in, not to the model's weights."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        self._visit = visit
        try:
            return self.model(input_ids=ids, use_cache=False)
        finally:
            self._visit = None

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int], visit: Visit | None) -> list[float]:
        """Log-probability of every token but the first, given those before it."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        body, piece = self.model.base_model, max(1, _LOGITS // self.model.config.get_text_config().vocab_size)
        self._visit = visit
        try:
            outputs = body(input_ids=ids, use_cache=False)
        finally:
            self._visit = None
        found: list[float] = []
        # Its logits at once could take more memory than anything else. What the model does behind its head is its own
        # business, so that the whole of it runs, with the body's output at hand.
        body.forward = lambda *_, **__: outputs
        try:
            for rows in torch.arange(len(tokens) - 1, device=ids.device).split(piece):
                logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0]
                chances = logits.float().log_softmax(-1)  # [rows, vocabulary]
                found += chances.gather(-1, ids[0, rows + 1, None])[:, 0].tolist()
        finally:
            del body.forward
        return found


def _attend_in_pieces(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Callable[..., torch.Tensor],
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Causal attention by a further mask, which is made for a few queries at a time.

    Args:
        q: `[batch, H, T, d]`.
        k: `[batch, G, T, d]`.
        v: As `k`.
        mask: A mask function of transformers, of batch, head, position of a query and of a key.
        scale: What products are multiplied with.
        window: Tokens that a query sees at most, itself included; None for all before it.

    Returns:
        `[batch, H, T, d]`.
    """
    positions, outputs = torch.arange(q.shape[2], device=q.device), []
    for queries in positions.split(_QUERIES):
        start, end = int(queries[0]), int(queries[-1]) + 1
        first = max(0, start + 1 - window) if window else 0
        seen = mask(0, 0, queries[:, None], positions[None, first:end])  # [queries, tokens]
        part, keys, values = q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]
        outputs.append(scaled_dot_product_attention(part, keys, values, seen, scale=scale, enable_gqa=True))
    return torch.cat(outputs, 2)
