"""What is compared: dense attention, and SPLA under some sets of options."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import learned
from ..algorithm.parameters import SplaParameters
from ..options import SplaOptions, full_attention_layers


@dataclass(frozen=True)
class Variant:
    """One way to run a model.

    Attributes:
        name: How reports and plots call it.
        options: The user's SPLA options; None for the platform's dense attention.
    """

    name: str
    options: Mapping[str, Any] | None = field(default=None, hash=False)


DENSE = Variant("dense")


@dataclass(frozen=True)
class ModelShape:
    """What the bytes of a model's cache depend on.

    `attention_layers` are the indices of those of full attention: layers with windows, or without attention, are not
    SPLA's.
    """

    model: str
    attention_layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position: int
    spla_config: Mapping[str, Any] | None

    @classmethod
    def of(cls, model: str) -> "ModelShape":
        """Shape of a local model folder, or of a model that the Hugging Face cache holds.

        Raises:
            ValueError: There is no such model here, or it has no ordinary attention.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(model, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"no model {model!r} on this machine ({reason}): name a local model folder") from error
        text = config.get_text_config()
        heads = getattr(text, "num_attention_heads", None)
        if heads is None:
            raise ValueError(f"the configuration of {model!r} names no attention heads: SPLA does not apply to it")
        layers = tuple(full_attention_layers(text))
        if not layers:
            raise ValueError(f"no layer of {model!r} has full attention: SPLA does not apply to it")
        return cls(
            model=model,
            attention_layers=layers,
            num_heads=heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
            max_position=text.max_position_embeddings,
            spla_config=getattr(config, "spla_config", None),
        )

    def parameters_file(self, options: Mapping[str, Any] | None) -> Path | None:
        """The file of learned parameters that an engine with the user's `options` takes.

        Raises:
            ValueError: They name one that does not exist.
        """
        return learned.find(self.model, options, self.spla_config)

    def options(self, options: Mapping[str, Any] | None) -> SplaOptions:
        """What an engine makes of the user's `options`, with those of the model's configuration and file.

        Raises:
            ValueError: As `SplaOptions.from_sources`.
        """
        path = self.parameters_file(options)
        return SplaOptions.from_sources(options, self.spla_config, None if path is None else learned.read_options(path))

    def learned(self, options: Mapping[str, Any] | None) -> dict[int, learned.LayerParameters] | None:
        """Learned parameters of every layer that SPLA computes, None without a file.

        Raises:
            ValueError: The file is not this model's.
        """
        path = self.parameters_file(options)
        if path is None:
            return None
        dense = self.options(options).dense_layers
        of_layer = partial(
            learned.read_layer,
            path,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
        )
        return {i: of_layer(i) for i in self.attention_layers if i not in dense}


def parse_variants(texts: Sequence[str], page_size: int, shape: ModelShape | None) -> list[Variant]:
    """Variants from the command line.

    Args:
        texts: Each a JSON object of options, or a JSON file of `{name: options}`; empty for the defaults alone.
        page_size: Tokens a page.
        shape: The model, whose options the user's go before; None for one without any.

    Raises:
        ValueError: Not JSON, no such option, sizes that do not fit each other, or one name twice.
    """
    variants: list[Variant] = []
    for text in texts or ["{}"]:
        if text.lstrip().startswith("{"):
            options = _json_object(text, f"--options {text}")
            variants.append(Variant(_name(options), options))
            continue
        path = Path(text)
        if not path.is_file():
            raise ValueError(f"--options {text} is neither a JSON object nor a file: write e.g. '{{\"budget\": 1024}}'")
        for name, options in _json_object(path.read_text(), text).items():
            if not isinstance(options, dict):
                raise ValueError(f"{text}: {name!r} must be an object of SPLA options, not {options!r}")
            variants.append(Variant(name, options))
    for variant in variants:
        parameters_of(variant, page_size, shape)
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1 or name == DENSE.name:
            raise ValueError(f"two variants are called {name!r}: give each options or a name of its own")
    return variants


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, not {value!r}")
    return value


def _name(options: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items()) or "spla"


def parameters_of(variant: Variant, page_size: int, shape: ModelShape | None) -> SplaParameters:
    """What a variant that is not dense computes in layers without a budget of their own, arguments as `parse_variants`.

    Raises:
        ValueError: Its options are not valid, or do not fit the page or the model.
    """
    options = SplaOptions.from_sources(variant.options) if shape is None else shape.options(variant.options)
    if shape is not None:
        options.check_layers(shape.attention_layers)
    return options.parameters(page_size)


def layers_of(variant: Variant, page_size: int, shape: ModelShape) -> dict[int, SplaParameters]:
    """What a variant computes in each layer that it does not leave dense: nothing, for the one that is dense."""
    if variant.options is None:
        return {}
    return shape.options(variant.options).layers(page_size, shape.attention_layers)


def without_residual(params: SplaParameters) -> SplaParameters:
    """The same selection with the tail dropped; nothing is left of how the residual was made."""
    return SplaParameters(
        page_size=params.page_size,
        selection_block=params.selection_block,
        budget_blocks=params.budget_blocks,
        first_blocks=params.first_blocks,
        last_blocks=params.last_blocks,
        selector=params.selector,
        statistics_dtype=params.statistics_dtype,
        fine_block=params.fine_block,
        least_candidates=params.least_candidates,
        fine_source=params.fine_source,
        fine_dtype=params.fine_dtype,
        tile=params.tile,
        tile_step=params.tile_step,
        candidate_tile=params.candidate_tile,
        top_p=params.top_p,
        residual="none",
    )


def mean_bytes_read(layers: Mapping[int, SplaParameters], seq_len: int, shape: ModelShape) -> int:
    """`bytes_read`, the mean over the layers of full attention; those not in `layers` are dense."""
    return round(fmean(bytes_read(layers.get(i), seq_len, shape.head_size) for i in shape.attention_layers))


def exact_up_to(layers: Mapping[int, SplaParameters]) -> int:
    """Tokens up to which every layer attends to everything, and the answer is dense attention's."""
    return min(params.whole_tokens for params in layers.values())


def bytes_read(params: SplaParameters | None, seq_len: int, head_size: int) -> int:
    """Bytes that attention of one decode token must read, for one layer and kv head: the floor, whatever a kernel does.

    Statistics of every complete page, keys and values of the selected blocks, the float32 recurrent state; elements of
    the cache take 2 bytes. Two levels read the keys of all candidates, or the sketches of those in complete pages with
    their means once more, and no statistics where these are everything and no tail takes its mass from them. With top-p
    it is what the whole budget reads, an upper bound.

    Args:
        params: What is computed; None for dense attention.
        seq_len: Tokens of the sequence, the current one included.
        head_size: Size of a key and of a value.
    """
    of_vector = head_size * 2
    if params is None or params.whole_tokens >= seq_len:
        return seq_len * 2 * of_vector
    import torch

    from ..kernels.layout import layouts

    def tokens_of(budget: int, block: int) -> int:
        """What a selection within `budget` tokens holds: its last block, the current one, may be partly filled."""
        return min(budget - block + (seq_len - 1) % block + 1, seq_len)

    page, state = layouts(params, head_size, torch.bfloat16)
    num_complete = (seq_len - 1) // params.page_size * params.blocks_per_page
    # Not `statistics_bytes`: that counts what aligns one block's statistics behind another's.
    statistics = num_complete * page.statistics_width * page.statistics_itemsize
    values = keys = tokens_of(params.budget_tokens, params.attended_block)
    sketches = 0
    if params.fine_block:
        candidates = params.candidate_blocks * params.selection_block
        if params.has_sketch:
            current = seq_len - num_complete * params.selection_block  # tokens of the current page
            sketched = tokens_of(candidates, params.selection_block) - current
            means = sketched // params.selection_block * head_size * page.statistics_itemsize
            sketches = means + sketched * page.sketch_bytes // params.page_size
        else:
            keys = tokens_of(candidates, params.selection_block)
        if candidates >= seq_len and (params.residual == "none" or params.combine != "shared_normalizer"):
            statistics = 0
    return statistics + sketches + (keys + values) * of_vector + 4 * (state.s_rows * head_size + state.z_size)
