"""Options of the backend: where they come from, what they default to, what is refused.

`--additional-config '{"spla": {...}}'` takes precedence over `spla_config` in the model's config.json, that over the
options that learned parameters bring (`learned.py`), those over the defaults. `docs/options.md` lists them for users.
"""

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .algorithm.parameters import COMBINES, RESIDUALS, SplaParameters

EXECUTORS = ("spla", "flashinfer")


class RefusedError(RuntimeError):
    """A configuration that SPLA does not support; the message is one sentence.

    No ValueError, which pydantic, that vLLM's configurations are made with, would bury in lines of its own.
    """


@dataclass(frozen=True)
class SplaOptions:
    """What a user may set. Sizes are in tokens.

    Attributes:
        budget: Tokens that a query attends to exactly, forced blocks included.
        selector: How blocks are scored; see `spla_backend.algorithm.selectors`.
        statistics_dtype: How statistics of blocks are stored: `auto`, in the dtype of the cache, or `fp8`, in a byte an
            element. None means `fp8` where the selector says how, as the built-in ones do.
        top_p: Stop selecting once this share of the estimated attention mass is covered; None spends the budget.
        selection_block_size: Tokens a selection block; None means 64, or the page where that is smaller.
        fine_block_size: Tokens a block of the fine level of selection (`algorithm/two_level.py`). 0 means one level,
            None 16, or one level where the executor has no other.
        candidates: Tokens of the blocks that the fine level chooses among; there are never fewer than two budgets.
        fine_source: What the fine level reads of the candidates: `keys`, or `int4`, a sketch of them in the page
            (`algorithm/sketch.py`). None means `int4` where the selector keeps the mean that a sketch counts from.
        first_blocks: Leading blocks always selected (attention sink).
        last_blocks: Trailing blocks always selected, the current one included.
        residual: What stands for the pages that are not selected: `regression`, `linear` (the paper's) or `none`.
        feature_map: Feature map of the `linear` residual.
        residual_scale: Factor on the covariance term of the `regression` residual.
        combine: `shared_normalizer`, or `double_rmsnorm` for models trained with it.
        rms_norm_eps: Epsilon of `double_rmsnorm`.
        dense_layers: Indices of layers that attend to everything, as without SPLA.
        layer_budgets: Budgets of some layers by their indices; all others have `budget`.
        prefill_dense_below: Prompt tokens at positions below this attend to everything. None means where a dense token
            is cheaper on a GPU (`kernels/gpu/attention.py`), and none on a CPU, beyond what is whole anyway.
        parameters_file: File of learned parameters, from the current folder or the model's; None means
            `spla.safetensors` beside the model's weights where there is one, `none` means no file.
        executor: What attends to the selected pages in decode on a GPU: `spla` or `flashinfer`.
    """

    budget: int = 2048
    selector: str = "rem"
    statistics_dtype: str | None = None
    top_p: float | None = None
    selection_block_size: int | None = None
    fine_block_size: int | None = None
    candidates: int = 8192
    fine_source: str | None = None
    first_blocks: int = 1
    last_blocks: int = 2
    residual: str = "regression"
    feature_map: str = "softmax"
    residual_scale: float = 0.5
    combine: str = "shared_normalizer"
    rms_norm_eps: float = 1e-6
    dense_layers: tuple[int, ...] = ()
    layer_budgets: Mapping[int, int] = field(default_factory=dict, hash=False)
    prefill_dense_below: int | None = None
    parameters_file: str | None = None
    executor: str = "spla"

    @classmethod
    def from_sources(cls, *sources: Mapping[str, Any] | None) -> "SplaOptions":
        """Merge option mappings, the first that names a key winning.

        One that names `budget` and no `layer_budgets` sets aside those of the mappings behind it, which were made for
        another budget; one that names `dense_layers` those of these layers.

        Raises:
            ValueError: Unknown key, wrong type or value out of range; one sentence naming what is valid.
        """
        merged: dict[str, Any] = {}
        for source in reversed(sources):
            if source is None:
                continue
            if not isinstance(source, Mapping):
                raise ValueError(f"SPLA options must be a mapping of names to values, not {source!r}")
            if "budget" in source:
                merged.pop("layer_budgets", None)
            source = _with_indices(source)
            if isinstance(dense := source.get("dense_layers"), tuple) and "layer_budgets" in merged:
                merged["layer_budgets"] = {i: n for i, n in merged["layer_budgets"].items() if i not in dense}
            merged.update(source)
        known = {f.name for f in fields(cls)}
        for key in merged:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"unknown SPLA option {key!r}{hint}: valid options are {', '.join(sorted(known))}")
        options = cls(**merged)
        options._check()
        return options

    def _check(self) -> None:
        from .algorithm.feature_maps import feature_map_names
        from .algorithm.selectors import get_selector, selector_names
        from .algorithm.sketch import FINE_SOURCES
        from .algorithm.statistics_format import STATISTICS_DTYPES

        self._check_integer("budget", 1)
        self._check_integer("first_blocks", 0)
        self._check_integer("last_blocks", 1)
        if self.prefill_dense_below is not None:
            self._check_integer("prefill_dense_below", 0)
        if self.selection_block_size is not None:
            self._check_integer("selection_block_size", 16)
            if self.selection_block_size % 16:
                raise ValueError(
                    f"SPLA option selection_block_size must be a multiple of 16, not {self.selection_block_size}"
                )
        if self.fine_block_size is not None:
            self._check_integer("fine_block_size", 0)
            if self.fine_block_size % 8:
                raise ValueError(
                    "SPLA option fine_block_size must be a multiple of 8, or 0 for one level, not "
                    f"{self.fine_block_size}"
                )
        self._check_integer("candidates", 1)
        check_parameters_file(self.parameters_file)
        layers = self.dense_layers
        if not isinstance(layers, tuple) or any(type(i) is not int or i < 0 for i in layers):
            raise ValueError(f"SPLA option dense_layers must be a list of layer indices like [0, 1], not {layers!r}")
        for layer, budget in self.layer_budgets.items():
            if type(budget) is not int or budget < 1:
                raise ValueError(
                    f"SPLA option layer_budgets must give layers integers of at least 1, not {budget!r} (layer {layer})"
                )
        both = set(layers) & set(self.layer_budgets)
        if both:
            raise ValueError(
                f"SPLA options dense_layers and layer_budgets both name layer {min(both)}: take it out of one of them"
            )
        self._check_choice("selector", selector_names())
        if self.statistics_dtype is not None:
            self._check_choice("statistics_dtype", STATISTICS_DTYPES)
        if self.fine_source is not None:
            self._check_choice("fine_source", FINE_SOURCES)
        self._check_choice("residual", RESIDUALS)
        self._check_choice("feature_map", feature_map_names())
        self._check_choice("combine", COMBINES)
        self._check_choice("executor", EXECUTORS)
        if self.top_p is not None:
            self._check_number("top_p", above=0, at_most=1)
        self._check_number("residual_scale", above=-1e-30)
        self._check_number("rms_norm_eps", above=0)
        if self.statistics_dtype == "fp8" and get_selector(self.selector).formats(64) is None:
            raise ValueError(
                f"SPLA selector {self.selector!r} does not say how to store its statistics in fp8 (Selector.formats): "
                "set statistics_dtype to 'auto'"
            )
        needs_mean = self.fine_block_size != 0 and self.fine_source == "int4"
        if needs_mean and not get_selector(self.selector).mean_first:
            raise ValueError(
                f"SPLA selector {self.selector!r} does not keep the mean of a block's keys in front of its statistics "
                "(Selector.mean_first), from which the sketch of fine_source 'int4' counts: set fine_source to 'keys' "
                "or choose another selector"
            )
        needs_mass = self.residual != "none" and self.combine == "shared_normalizer"
        if needs_mass and not get_selector(self.selector).has_mass:
            raise ValueError(
                f"SPLA selector {self.selector!r} ranks blocks without estimating their mass, which the residual "
                f"{self.residual!r} needs: set residual to 'none' or choose another selector"
            )
        if self.combine == "double_rmsnorm" and self.residual == "regression":
            raise ValueError(
                "SPLA option combine 'double_rmsnorm' joins the paper's linear attention: set residual to 'linear'"
            )

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"SPLA option {name} must be an integer of at least {least}, not {value!r}")

    def _check_number(self, name: str, above: float, at_most: float = float("inf")) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not above < value <= at_most:
            upper = "" if at_most == float("inf") else f" and at most {at_most}"
            raise ValueError(f"SPLA option {name} must be a number above {max(above, 0):g}{upper}, not {value!r}")

    def _check_choice(self, name: str, choices: Any) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"unknown SPLA {name} {value!r}: choose one of {', '.join(choices)}")

    def block_size(self, page_size: int) -> int:
        """Tokens a selection block for pages of `page_size` tokens."""
        return min(64, page_size) if self.selection_block_size is None else self.selection_block_size

    def check_layers(self, layers: Collection[int]) -> None:
        """Check `dense_layers` and `layer_budgets` against the indices of a model's layers of full attention.

        Raises:
            ValueError: One of them is none of these, or all of these are dense.
        """
        for name in ("dense_layers", "layer_budgets"):
            unknown = set(getattr(self, name)) - set(layers)
            if unknown:
                raise ValueError(
                    f"SPLA option {name} names layer {min(unknown)}, which is no layer of full attention in this "
                    f"model: choose among {', '.join(map(str, sorted(layers)))}"
                )
        if layers and not set(layers) - set(self.dense_layers):
            raise ValueError("SPLA option dense_layers names all layers: remove --attention-backend spla instead")

    def largest_budget(self, max_model_len: int) -> int:
        """Of all layers that select in sequences of up to `max_model_len` tokens, 0 where none does."""
        return max((n for n in (self.budget, *self.layer_budgets.values()) if n < max_model_len), default=0)

    def layers(self, page_size: int, indices: Iterable[int]) -> dict[int, SplaParameters]:
        """What each of these layers computes; those of `dense_layers` are left out. Raises as `parameters`."""
        return {i: self.parameters(page_size, i) for i in indices if i not in self.dense_layers}

    def parameters(self, page_size: int, layer: int | None = None) -> SplaParameters:
        """What the algorithm computes, for pages of `page_size` tokens.

        Args:
            page_size: Tokens a page.
            layer: In which layer; None: in those that `layer_budgets` does not name.

        Raises:
            ValueError: Page, selection block and the budget of any layer do not fit each other.
        """
        from .algorithm.selectors import get_selector
        from .algorithm.statistics_format import MAX_COUNT

        block = self.block_size(page_size)
        if page_size % 16:
            raise ValueError(f"SPLA needs pages of a multiple of 16 tokens, not {page_size}: set --block-size 64")
        if page_size % block:
            raise ValueError(
                f"SPLA selection blocks of {block} tokens do not divide pages of {page_size}: set --block-size to a "
                f"multiple of {block} or the option selection_block_size to a divisor of {page_size}"
            )
        if self.fine_block_size and block % self.fine_block_size:
            raise ValueError(
                f"SPLA option fine_block_size must divide the selection blocks of {block} tokens, not be "
                f"{self.fine_block_size}: set it to 16, or to 0 for one level"
            )
        selector = get_selector(self.selector)
        counts_too_far = selector.counts_keys and block > MAX_COUNT
        if self.statistics_dtype == "fp8" and counts_too_far:
            raise ValueError(
                f"SPLA selector {self.selector!r} counts up to {MAX_COUNT} tokens with statistics_dtype 'fp8', and its "
                f"blocks have {block}: set selection_block_size to less, or statistics_dtype to 'auto'"
            )
        lacks_fp8 = selector.formats(64) is None
        fine_block = self.fine_block_size
        if fine_block is None:
            fine_block = 0 if self.executor == "flashinfer" else 16  # FlashInfer attends to whole pages
        params = SplaParameters(
            page_size=page_size,
            selection_block=block,
            budget_blocks=(self.budget if layer is None else self.layer_budgets.get(layer, self.budget)) // block,
            first_blocks=self.first_blocks,
            last_blocks=self.last_blocks,
            selector=self.selector,
            statistics_dtype=self.statistics_dtype or ("auto" if lacks_fp8 or counts_too_far else "fp8"),
            fine_block=fine_block,
            least_candidates=self.candidates // block,
            fine_source=self.fine_source or ("int4" if selector.mean_first else "keys"),
            top_p=self.top_p,
            residual=self.residual,
            feature_map=self.feature_map,
            residual_scale=self.residual_scale,
            combine=self.combine,
            rms_norm_eps=self.rms_norm_eps,
        )
        for which, budget in {"": self.budget, **{f" (layer {i})": n for i, n in self.layer_budgets.items()}}.items():
            if budget // block < params.max_forced_blocks:
                raise ValueError(
                    f"a SPLA budget of {budget} tokens{which} is less than the blocks that are always selected: with "
                    f"pages of {page_size} and selection blocks of {block} tokens it must be at least "
                    f"{params.max_forced_blocks * block}"
                )
        return params


def full_attention_layers(text: Any) -> list[int]:
    """Indices by a text configuration of transformers; layers with windows, in models that mix them with full
    attention, are not SPLA's."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


def _with_indices(source: Mapping[str, Any]) -> dict[str, Any]:
    """Options with indices of layers as they are kept here, not as JSON has them."""
    options = dict(source)
    if isinstance(options.get("dense_layers"), list):
        options["dense_layers"] = tuple(options["dense_layers"])
    if "layer_budgets" in options:
        options["layer_budgets"] = _by_index(options["layer_budgets"])
    return options


def _by_index(value: Any) -> dict[int, int]:
    """`layer_budgets` with integers for keys, which JSON has as strings, in the order of the layers."""
    if not isinstance(value, Mapping):
        raise ValueError(f'SPLA option layer_budgets must map layer indices to tokens like {{"0": 512}}, not {value!r}')
    by_index: dict[int, int] = {}
    for key, tokens in value.items():
        index = int(key) if isinstance(key, str) and key.isdecimal() else key
        if type(index) is not int or index < 0:
            raise ValueError(f'SPLA option layer_budgets must name layers by index like {{"0": 512}}, not {key!r}')
        if index in by_index:
            raise ValueError(f"SPLA option layer_budgets names layer {index} twice")
        by_index[index] = tokens
    return dict(sorted(by_index.items()))


def check_parameters_file(value: Any) -> None:
    """Raises:
    ValueError: No value of the option `parameters_file`.
    """
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"SPLA option parameters_file must be the path of a file or 'none', not {value!r}")
