"""What `spla-calibrate` does: cut the text, fit layers, gains and scales, judge on held-out text, write."""

import argparse
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import learned
from ..algorithm.parameters import SplaParameters
from ..evaluate import report
from ..evaluate.capture import CapturingModel, Visit
from ..evaluate.documents import cut_documents, load_tokenizer
from ..evaluate.fidelity import attention
from ..evaluate.perplexity import compare, rows_of, segments_of, table
from ..evaluate.variants import DENSE, ModelShape, exact_up_to, without_residual
from ..options import SplaOptions
from .costs import Continued
from .fit import HeadParameters, fit
from .layers import FittedLayers, fit_layers

NONE, BEFORE, AFTER = "no residual", "before", "after"
_WINDOWS = 6  # to choose dense layers on, where budgets do not say how many


def run(args: argparse.Namespace) -> str:
    """Calibrate; returns the table of before and after.

    Raises:
        ValueError: Something cannot be calibrated, read or written; one sentence.
    """
    shape = ModelShape.of(args.model)
    options = SplaOptions.from_sources(args.options, shape.spla_config)
    params = options.parameters(args.page_size)
    options.check_layers(shape.attention_layers)
    before = options.layers(args.page_size, shape.attention_layers)
    steps = args.steps if args.steps is not None else 0 if args.budgets or args.dense_layers else 40
    path = _output(args.output or Path(args.model) / learned.FILE_NAME)
    if args.report is not None:
        _output(args.report)
    exact = exact_up_to(before)
    if params.residual == "none" or params.combine != "shared_normalizer":
        raise ValueError(
            "spla-calibrate fits the residual under a shared normaliser: set the option residual to 'regression' or "
            "'linear', and combine to 'shared_normalizer'"
        )
    _check_layers(args, len(before), shape.spla_config or {})
    if args.features and params.residual != "linear":
        raise ValueError("--features fits the feature map of the residual 'linear': set the option residual to it")
    if args.features and not steps:
        raise ValueError("--features is fitted in steps, and there are none: give --steps as well")
    if not steps and path.is_file() and learned.holds_parameters(path):
        raise ValueError(
            f"{path} holds learned parameters, and without --steps a file of options alone would take its place: name "
            "another file by --output, or give --steps to fit them anew"
        )
    test_length = min(args.test_length, shape.max_position)
    if min(args.length, test_length) < exact + args.page_size:
        raise ValueError(
            f"windows of {args.length} and test documents of {test_length} tokens hardly go beyond the "
            f"{exact} up to which everything is attended to: give greater --length and --test-length or a smaller "
            "budget"
        )
    windows, tests, files = _documents(args, test_length)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = Continued(args.model, getattr(torch, args.dtype), device, head=True)

    began = time.monotonic()
    chosen: FittedLayers | None = None
    some = windows[: args.budgets or _WINDOWS] if args.budgets or args.dense_layers else []
    if some:
        chosen = _fit_layers(args, model, some, before)
        options = chosen_options(options, chosen, params.selection_block)
    after = options.layers(args.page_size, shape.attention_layers)
    fitted = HeadParameters(
        shape.attention_layers,
        shape.num_heads,
        params,
        device,
        (shape.num_kv_heads, shape.head_size) if args.features else None,
    )
    divergences: list[float] = []
    with tqdm(total=steps, desc="fitting", unit="window", disable=not steps) as bar:

        def show(divergence: float) -> None:
            divergences.append(divergence)
            recent = divergences[-len(windows) :]
            bar.set_postfix(divergence=f"{sum(recent) / len(recent):.4f}")
            bar.update()

        fit(
            model,
            windows,
            after,
            fitted,
            steps=steps,
            learning_rate=args.learning_rate,
            report=show,
        )
    seconds = round(time.monotonic() - began, 1)

    with torch.no_grad():
        # Those of dense layers are as they came: whoever leaves fewer layers dense finds all that it takes.
        layers = fitted.layers() if steps else {}
    none = {i: without_residual(layer) for i, layer in before.items()}
    visits = {
        DENSE.name: None,
        NONE: partial(attention, params=none),
        BEFORE: partial(attention, params=before),
        AFTER: partial(attention, params=after, learned=layers or None),
    }
    losses = _losses(model, tests, visits)
    first = exact_up_to(after)
    buckets = [(first, exact), (exact, test_length)] if first < exact else [(exact, test_length)]
    gained = compare(losses[AFTER], losses[BEFORE], exact, test_length)
    result: dict[str, Any] = {
        **report.header(
            "calibration", _settings(args, steps, files, len(windows), len(some), device), "spla-calibrate"
        ),
        "fit_seconds": seconds,
        "rows": rows_of(
            losses,
            {DENSE.name: {}, NONE: none, BEFORE: before, AFTER: after},
            files,
            buckets,
            shape,
        ),
        "dense_layers": options.dense_layers,
        "layer_budgets": options.layer_budgets,
        "layer_costs": [{"layer": i, "nats": round(x, 7)} for i, x in chosen.costs.items()] if chosen else [],
        "after_against_before": {key: gained[key] for key in ("difference", "difference_se")},
        "segments": segments_of(losses, files),
        "divergence_of_steps": [round(x, 6) for x in divergences],
        "parameters": [
            {
                "layer": i,
                **{name: [round(x, 4) for x in t.tolist()] for name, t in layer.tensors().items() if t.dim() == 1},
            }
            for i, layer in layers.items()
            if i in after
        ],
    }
    learned.write(path, layers, _options_of(options, params))
    if args.report is not None:
        report.write(result, args.report)
    error = f" +- {gained['difference_se']:.4f}" if gained["difference_se"] is not None else ""
    ranking = f"{_ranking(chosen)}\n\n" if chosen else ""
    return f"{ranking}{table(result)}\nafter - before: {gained['difference']:+.4f}{error}\nwritten: {path}"


def _check_layers(args: argparse.Namespace, num_layers: int, of_config: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: Layers cannot be chosen, or what is written would not count.
    """
    if args.dense_layers and args.dense_layers >= num_layers:
        raise ValueError(
            f"--dense-layers {args.dense_layers} leaves SPLA none of the {num_layers} layers that it computes: give "
            f"at most {num_layers - 1}"
        )
    for flag, wanted, name in (
        ("--dense-layers", args.dense_layers, "dense_layers"),
        ("--budgets", args.budgets, "layer_budgets"),
        ("--budgets", args.budgets, "budget"),  # sets budgets of layers aside
    ):
        if wanted and name in of_config:
            raise ValueError(
                f"{name} of spla_config in the model's config.json goes before what {flag} writes: take it out there"
            )


def _fit_layers(
    args: argparse.Namespace,
    model: Continued,
    windows: Sequence[Sequence[int]],
    before: Mapping[int, SplaParameters],
) -> FittedLayers:
    with tqdm(total=len(windows) * len(before), desc="costs of layers", unit="layer") as bar:
        return fit_layers(
            model,
            windows,
            before,
            num_dense=args.dense_layers or 0,
            budgets=bool(args.budgets),
            tail=min(512, args.length // 4),
            seed=args.seed,
            report=bar.update,
        )


def chosen_options(options: SplaOptions, chosen: FittedLayers, block: int) -> SplaOptions:
    """The options with the layers that were chosen added to `dense_layers`, and their budgets if some were fitted."""
    budgets = {i: n * block for i, n in chosen.budgets.items()} or options.layer_budgets
    return replace(
        options,
        dense_layers=tuple(sorted({*options.dense_layers, *chosen.dense})),
        layer_budgets={i: n for i, n in budgets.items() if i not in chosen.dense},
    )


def _ranking(chosen: FittedLayers) -> str:
    """Table of what layers cost, the costliest first."""
    lines = ["estimated cost by layer under the options' budget, nats a token, and share of all so far"]
    total, so_far = sum(chosen.costs.values()), 0.0
    for i, cost in chosen.costs.items():
        so_far += cost
        share = so_far / total if total else 1.0
        lines.append(f"{i:5} {cost:10.6f} {share:5.0%}{' dense' if i in chosen.dense else ''}")
    return "\n".join(lines)


def _output(path: Path) -> Path:
    if not path.absolute().parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    return path


def _documents(
    args: argparse.Namespace, test_length: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[str]]:
    """Windows to fit on, in random order; documents to judge on, and their files."""
    tokenizer = load_tokenizer(args.model)
    if args.test:
        tests, skip = cut_documents(args.test, tokenizer, test_length, args.test_documents), 0
    else:
        tests, skip = cut_documents(args.text, tokenizer, test_length, 1), test_length
    windows = [d.tokens for d in cut_documents(args.text, tokenizer, args.length, None, skip)]
    random.Random(args.seed).shuffle(windows)
    return windows, [d.tokens for d in tests], [d.file for d in tests]


def _losses(
    model: CapturingModel,
    tests: Sequence[Sequence[int]],
    visits: Mapping[str, Visit | None],
) -> dict[str, list[list[float]]]:
    """Loss of every token by variant and document."""
    losses: dict[str, list[list[float]]] = {name: [] for name in visits}
    with tqdm(total=len(visits) * len(tests), desc="judging", unit="document") as bar:
        for tokens in tests:
            for name, visit in visits.items():
                losses[name].append([-x for x in model.logprobs(tokens, visit)])
                bar.update()
    return losses


def _options_of(options: SplaOptions, params: SplaParameters) -> dict[str, Any]:
    """The options that the parameters mean something with."""
    fitted_for = {
        "budget": options.budget,
        "selector": params.selector,
        "selection_block_size": params.selection_block,
        "first_blocks": params.first_blocks,
        "last_blocks": params.last_blocks,
        "residual": params.residual,
        "statistics_dtype": params.statistics_dtype,
        "fine_block_size": params.fine_block,
    }
    if params.fine_block:
        fitted_for |= {
            "candidates": params.candidate_blocks * params.selection_block,
            "fine_source": params.fine_source,
        }
    if params.top_p is not None:
        fitted_for["top_p"] = params.top_p
    if options.dense_layers:
        fitted_for["dense_layers"] = list(options.dense_layers)
    if options.layer_budgets:
        fitted_for["layer_budgets"] = dict(options.layer_budgets)
    if params.residual == "regression":  # counts where the file holds none by layer
        fitted_for["residual_scale"] = params.residual_scale
    if params.residual == "linear":
        fitted_for["feature_map"] = params.feature_map
    return fitted_for


def _settings(
    args: argparse.Namespace, steps: int, files: Sequence[str], windows: int, cost_windows: int, device: str
) -> dict[str, Any]:
    return {
        "model": args.model,
        "options": args.options,
        "text": args.text,
        "windows": windows,
        "length": args.length,
        "steps": steps,
        "cost_windows": cost_windows,
        "dense_layers": args.dense_layers,
        "budgets": args.budgets,
        "learning_rate": args.learning_rate,
        "features": args.features,
        "documents": {file: files.count(file) for file in dict.fromkeys(files)},
        "page_size": args.page_size,
        "device": device,
        "dtype": args.dtype,
    }
