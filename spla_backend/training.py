"""Train a transformers model with SPLA in place of its attention, and save it as `vllm serve` takes it.

How to use it, and what came of it: docs/training.md.

    model = AutoModelForCausalLM.from_pretrained(folder)
    attach(model, {"budget": 1024})
    ...  # any training loop: learned parameters of SPLA are among model.parameters()
    save(model, output)

Importing this module makes `attn_implementation="spla"` known to transformers; `attach` switches a model to it. What is
computed is `algorithm/sequence.py`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from . import learned
from .algorithm.parameters import SplaParameters
from .algorithm.residual import BlockReader, make_residual
from .algorithm.sequence import spla_attention
from .options import SplaOptions

NAME = "spla"
PAGE_SIZE = 64
_TINY = 1e-30


class LearnedSpla(nn.Module):
    """What one attention layer needs to compute SPLA: parameters, and those that are learned.

    Attributes:
        log_gain: Log of the factor on the tail's mass `[H]`, for `shared_normalizer` with a residual; else absent.
        log_residual_scale: Log of the factor on the covariance of the `regression` residual `[1]`; else absent.
        feature_weight: What queries and keys are multiplied with before the feature map of the `linear` residual
            `[G, d, d]`, if it is to be learned; else absent.
        exact_norm: RMSNorm weight of the exact part `[H, d]`, for `double_rmsnorm`; else absent.
        tail_norm: RMSNorm weight of the tail `[H, d]`, likewise.
    """

    def __init__(
        self, params: SplaParameters, num_heads: int, head_size: int, device: torch.device, feature_heads: int = 0
    ) -> None:
        super().__init__()
        self.params = params
        if feature_heads:
            self.feature_weight = nn.Parameter(torch.eye(head_size, device=device).repeat(feature_heads, 1, 1))
        if params.combine == "double_rmsnorm":
            self.exact_norm = nn.Parameter(torch.ones(num_heads, head_size, device=device))
            self.tail_norm = nn.Parameter(torch.ones(num_heads, head_size, device=device))
        elif params.residual != "none":
            # Logs, so that no optimiser makes a factor negative.
            self.log_gain = nn.Parameter(torch.zeros(num_heads, device=device))
            if params.residual == "regression":
                scale = torch.tensor([float(params.residual_scale)], device=device)
                self.log_residual_scale = nn.Parameter(scale.clamp(min=_TINY).log())

    def parameters_of_layer(self) -> learned.LayerParameters:
        """What the side file holds of this layer."""
        found = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return learned.LayerParameters(
            **{name.removeprefix("log_"): t.exp() if name.startswith("log_") else t for name, t in found.items()}
        )

    @torch.no_grad()
    def load(self, stored: learned.LayerParameters) -> None:
        """Take what a side file holds; a scale that it has not is the option's, feature weights the identity.

        Raises:
            ValueError: Other parameters than these options have.
        """
        tensors = stored.tensors()
        expected = self.parameters_of_layer().tensors().keys()
        optional = {"residual_scale", "feature_weight"}
        if tensors.keys() | optional != expected | optional or tensors.keys() - expected:
            raise ValueError(
                f"these SPLA options have the learned parameters {sorted(expected)}, but there are {sorted(tensors)}: "
                "attach with the options that the model was trained with"
            )
        for name, tensor in tensors.items():
            if hasattr(self, f"log_{name}"):
                getattr(self, f"log_{name}").copy_(tensor.clamp(min=_TINY).log())
            else:
                getattr(self, name).copy_(tensor)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of scaled queries `[batch, H, L, d]`, keys and values `[batch, G, T, d]`; see `spla_attention`."""
        # As in the engine: queries, keys and values in the model's dtype, sums and states in float32 at least.
        if torch.is_autocast_enabled(q.device.type):
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            own = {name: parameter.to(dtype) for name, parameter in self.named_parameters()}
            params = self.params
            if "log_residual_scale" in own:
                params = replace(params, residual_scale=own["log_residual_scale"].exp())
            norms = (own["exact_norm"], own["tail_norm"]) if "exact_norm" in own else None
            log_gain = own.get("log_gain")
            return spla_attention(
                q,
                k,
                v,
                params,
                log_gain=log_gain,
                norm_weights=norms,
                feature_weight=own.get("feature_weight"),
                reader=block_reader(params, q),
            )


def block_reader(params: SplaParameters, q: Tensor) -> BlockReader | None:
    """The kernel that reads the blocks of the rest for `q [..., d]`, on a GPU and for sums in float32; else None."""
    residual = make_residual(params, q.shape[-1])
    if residual is None or not q.is_cuda or q.dtype == torch.float64:
        return None
    from .kernels.training.read_blocks import MOST, read_chosen_sums  # Triton is needed on a GPU alone

    return read_chosen_sums if max(q.shape[-1], residual.z_size) <= MOST else None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: query `[batch, H, L, d]`, key and value `[batch, G, T, d]`."""
    if kwargs.get("s_aux") is not None:
        raise ValueError(
            f"{type(module).__name__} has learned attention sinks, with which SPLA does not train: layers that are not "
            "its go through transformers' SDPA, which leaves sinks out. Train the model without SPLA, and serve it with"
        )
    if getattr(module, "sliding_window", None) or kwargs.get("sliding_window"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    options = getattr(module.config, "spla_config", None) or {}
    layer = _attend_densely if module.layer_idx in options.get("dense_layers", ()) else getattr(module, NAME, None)
    if layer is None:
        raise ValueError("this model has no SPLA parameters yet: call spla_backend.training.attach(model) first")
    if attention_mask is not None:
        raise ValueError(
            "SPLA trains on whole sequences: give sequences without padding on the left, one a row, and no mask of "
            "your own"
        )
    if kwargs.get("dropout"):
        raise ValueError("SPLA has no attention dropout: set attention_dropout to 0 in the model's configuration")
    scaling = kwargs.get("scaling")
    output = layer(query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key, value)
    return output.to(query.dtype).transpose(1, 2), None


def _attend_densely(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `LearnedSpla` computes, of every token before: for the layers that the option `dense_layers` names."""
    length, total = q.shape[2], k.shape[2]
    seen = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length) if length < total else None
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, scale=1.0, enable_gqa=True
    )


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """None where every sequence is one causal piece, padded at most on the right; else a mask, which `_attend` refuses.

    Arguments are those of `sdpa_mask` of transformers.
    """
    plain = mask_function is causal_mask_function and kv_offset == 0 and int(q_offset) + q_length == kv_length
    if plain and (attention_mask is None or bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())):
        return None
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask=attention_mask, **kwargs
    )


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


def attention_layers(model: Any) -> Iterator[tuple[int, Any]]:
    """Index and module of each layer of full attention, in the order of the model."""
    for module in model.modules():
        # What every attention module of transformers with key-value heads has.
        is_attention = hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups")
        if is_attention and not getattr(module, "sliding_window", None):
            yield int(module.layer_idx), module


def attach(
    model: PreTrainedModel,
    options: Mapping[str, Any] | None = None,
    page_size: int = PAGE_SIZE,
    learn_features: bool = False,
) -> None:
    """Put SPLA in place of the full attention of a model.

    Learned parameters begin at 1, or at what the `spla.safetensors` of the model's folder holds; a model to which SPLA
    is attached keeps those that it has. The resolved options go into the model's configuration as `spla_config`.
    Prompts select from the beginning there (`prefill_dense_below` 0), because that is what is trained, if the options
    do not say otherwise.

    Args:
        model: A causal language model of transformers.
        options: SPLA options (docs/options.md), which go before the `spla_config` of the model, and that before the
            options in its side file.
        page_size: Tokens a page: the `--block-size` that the model is to be served with.
        learn_features: Learn a matrix for each kv head that queries and keys are multiplied with before the feature map
            of the `linear` residual, beginning with the identity. A side file that holds one brings it anyway.

    Raises:
        ValueError: Invalid options, a model without ordinary attention, or a side file that does not fit them.
    """
    config = model.config.get_text_config()
    side_file = Path(model.config._name_or_path or "-") / learned.FILE_NAME
    has_file = side_file.is_file()
    of_file = learned.read_options(side_file) if has_file else None
    of_config = getattr(config, "spla_config", None)
    resolved = SplaOptions.from_sources(options, of_config, of_file, {"prefill_dense_below": 0})
    params = resolved.parameters(page_size)  # but for the budgets of `layer_budgets`
    layers = list(attention_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention layer that SPLA could replace")
    resolved.check_layers([index for index, _ in layers])
    if learn_features and params.residual != "linear":
        raise ValueError("learn_features is for the option residual 'linear', whose feature map it changes")
    has_parameters = has_file and learned.holds_parameters(side_file)  # a file may hold options alone
    for index, module in layers:
        if index in resolved.dense_layers:
            if hasattr(module, NAME):
                delattr(module, NAME)
            continue
        device, num_heads = next(module.parameters()).device, config.num_attention_heads
        kv_heads = num_heads // module.num_key_value_groups
        stored = None
        if hasattr(module, NAME):
            stored = getattr(module, NAME).parameters_of_layer()
        elif has_parameters:
            shape = {"num_heads": num_heads, "num_kv_heads": kv_heads, "head_size": module.head_dim}
            stored = learned.read_layer(side_file, index, **shape)
        has_features = learn_features or (stored is not None and stored.feature_weight is not None)
        params = resolved.parameters(page_size, index)
        layer = LearnedSpla(params, num_heads, module.head_dim, device, kv_heads if has_features else 0)
        if stored is not None:
            layer.load(stored)
        setattr(module, NAME, layer)
    config.spla_config = {name: value for name, value in asdict(resolved).items() if value not in (None, (), {})}
    model.set_attn_implementation(NAME)


def set_budget(model: PreTrainedModel, budget: int) -> None:
    """Attend within another budget from here on, so that a training loop can draw one for each step.

    Everything else stays: learned parameters, and `spla_config`, with the budget that the saved model is served with.
    Budgets of `layer_budgets` are set aside, being made for another budget.

    Args:
        model: With SPLA attached.
        budget: Tokens, as the option.

    Raises:
        ValueError: An invalid budget, or a model without SPLA.
    """
    layers = [(index, getattr(module, NAME)) for index, module in attention_layers(model) if hasattr(module, NAME)]
    if not layers:
        raise ValueError("this model has no SPLA whose budget could change: call spla_backend.training.attach first")
    options = SplaOptions.from_sources({"budget": budget}, model.config.get_text_config().spla_config)
    for index, layer in layers:
        layer.params = options.parameters(layer.params.page_size, index)


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model folder for `vllm serve`: weights, `config.json` with `spla_config`, and `spla.safetensors`.

    A model to which SPLA was never attached is saved as it is. The tokenizer is the caller's business.
    """
    own = f".{NAME}."
    model.save_pretrained(folder, state_dict={n: t for n, t in model.state_dict().items() if own not in n})
    layers = {i: getattr(m, NAME).parameters_of_layer() for i, m in attention_layers(model) if hasattr(m, NAME)}
    if any(layer.tensors() for layer in layers.values()):
        config = model.config.get_text_config().spla_config
        learned.write(Path(folder) / learned.FILE_NAME, layers, config)


@torch.no_grad()
def fit_norms(model: PreTrainedModel, batches: Iterable[Tensor]) -> None:
    """Let a model with `double_rmsnorm` begin near the one it was: least-squares weights for the exact part, none for
    the tail.

    RMSNorm takes the length of every output away, which an ordinary model makes use of. The weight of an element that
    brings the normalised output of *dense* attention nearest to the output itself, over all tokens of some text, is
    `sum(o n) / sum(n n)` with `n = o / rms(o)`. The weights of the tail begin at 0 and have a gradient there.

    Args:
        model: With SPLA attached.
        batches: Token ids `[batch, length]`, on the model's device.

    Raises:
        ValueError: The model combines in another way.
    """
    layers = [getattr(module, NAME) for _, module in attention_layers(model) if hasattr(module, NAME)]
    if not layers or layers[0].params.combine != "double_rmsnorm":
        raise ValueError("fit_norms is for models with the option combine 'double_rmsnorm'")
    sums = {layer: (torch.zeros_like(layer.exact_norm), torch.zeros_like(layer.exact_norm)) for layer in layers}

    def collect(layer: LearnedSpla, arguments: tuple[Tensor, Tensor, Tensor], output: Tensor) -> Tensor:
        q, k, v = arguments
        dense = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
        exact = dense.float()  # [batch, H, L, d]
        normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + layer.params.rms_norm_eps)
        sums[layer][0].add_((exact * normed).sum((0, 2)))
        sums[layer][1].add_(normed.square().sum((0, 2)))
        return dense.to(output.dtype)  # the next layer, too, sees what the dense model would show it

    handles = [layer.register_forward_hook(collect) for layer in layers]
    try:
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        product, square = sums[layer]
        layer.exact_norm.copy_(product / square.clamp(min=1e-30))
        layer.tail_norm.zero_()
