"""`spla-eval fidelity`: the grid of selectors, blocks, budgets and residuals on a model and the user's text."""

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from ..algorithm.selectors import get_selector, selector_names
from . import report
from .capture import AttentionInputs, CapturingModel
from .documents import cut_documents, load_tokenizer
from .fidelity import Point, measure, sample_positions, standard_error, summary
from .variants import ModelShape, Variant, bytes_read, layers_of, parameters_of, parse_variants, without_residual


def grid(
    selectors: Sequence[str], blocks: Sequence[int], budgets: Sequence[int], residuals: Sequence[str]
) -> list[Variant]:
    """All combinations that exist, in one level: a selector without a mass goes with no residual only."""
    variants = []
    for block, budget, selector, residual in itertools.product(blocks, budgets, selectors, residuals):
        if residual != "none" and not get_selector(selector).has_mass:
            continue
        options = {"selector": selector, "selection_block_size": block, "budget": budget, "residual": residual,
                   "fine_block_size": 0, "statistics_dtype": "auto"}  # fmt: skip
        variants.append(Variant(f"{selector} b={block} budget={budget} {residual}", options))
    return variants


def points_of(variants: Sequence[Variant], page_size: int, shape: ModelShape, output: bool) -> list[Point]:
    """A point for each variant, then an oracle for every block size, budget and set of forced blocks among them."""
    for variant in variants:
        layers = layers_of(variant, page_size, shape)
        if len(layers) < len(shape.attention_layers):
            raise ValueError(
                f"{variant.name} leaves layers dense and fidelity looks at every layer: drop the option dense_layers, "
                "and choose layers with --layers"
            )
        if set(layers.values()) != {parameters_of(variant, page_size, shape)}:
            raise ValueError(
                f"{variant.name} gives layers budgets of their own and fidelity looks at all layers with one: drop the "
                "option layer_budgets, and give --options for each budget"
            )
    points = [Point(parameters_of(variant, page_size, shape), output=output) for variant in variants]
    oracles = {
        Point(
            replace(
                without_residual(point.params),
                selector="mean",
                statistics_dtype="auto",
                fine_source="keys",
                top_p=None,
            ),
            oracle=True,
            output=output,
        ): None
        for point in points
    }
    return points + list(oracles)


def run(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The report of `spla-eval fidelity`; `save` gets it once, at the end."""
    shape = ModelShape.of(args.model)
    length = min(args.length, shape.max_position)
    start = length // 2 if args.start is None else args.start
    if not 0 <= start < length:
        raise ValueError(f"--start {start} is outside documents of {length} tokens: give a smaller one")
    layers = set(shape.attention_layers if args.layers is None else args.layers)
    if not layers <= set(shape.attention_layers):
        raise ValueError(
            f"--layers must be among {', '.join(map(str, shape.attention_layers))}: {args.model!r} has no others of "
            "full attention"
        )
    for selector in args.selectors or []:
        get_selector(selector)
    if args.options:
        variants = parse_variants(args.options, args.page_size, shape)
    else:
        blocks = args.block_sizes or [b for b in (16, 32, 64) if args.page_size % b == 0]
        residuals = ["none"] if args.mass_only else args.residuals
        variants = grid(args.selectors or selector_names(), blocks, args.budgets, residuals)
    points = points_of(variants, args.page_size, shape, not args.mass_only)
    documents = cut_documents(args.text, load_tokenizer(args.model), length, args.documents)
    positions = sample_positions(start, length, args.queries, args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = CapturingModel(args.model, getattr(torch, args.dtype), device)

    masses: list[list[torch.Tensor]] = []
    errors: list[list[torch.Tensor]] = []
    with tqdm(total=len(documents) * len(layers), unit="layer") as bar:
        for document in documents:
            bar.set_description(document.file)
            mass_of_layers: list[torch.Tensor] = []
            error_of_layers: list[torch.Tensor] = []

            def visit(inputs: AttentionInputs) -> None:
                if inputs.layer in layers:
                    mass, error = measure(inputs, positions, points)
                    mass_of_layers.append(mass)  # noqa: B023 - called before the next document
                    error_of_layers.append(error)  # noqa: B023
                    bar.update()

            model.run(document.tokens, visit)
            if not mass_of_layers:
                raise ValueError(f"{args.model!r} showed no layer of full attention: SPLA would not be used in it")
            masses.append(mass_of_layers)
            errors.append(error_of_layers)
    mass = torch.stack([torch.stack(x) for x in masses])  # [documents, layers, points, heads]
    error = torch.stack([torch.stack(x) for x in errors])

    files = [document.file for document in documents]
    rows = []
    for i, point in enumerate(points):
        params = point.params
        row: dict[str, Any] = {
            "variant": variants[i].name if i < len(variants) else f"{point.selector} b={params.attended_block}",
            "selector": point.selector,
            "page_size": params.page_size,
            "block": params.attended_block,
            "budget": params.budget_tokens,
            "residual": params.residual,
            "bytes": None if point.oracle else bytes_read(params, length, shape.head_size),
            **summary(mass[:, :, i], error[:, :, i]),
        }
        without = None
        if params.residual != "none" and point.output:
            wanted = replace(point, params=without_residual(params))
            without = next((j for j, other in enumerate(points) if other == wanted), None)
        if without is not None:
            difference = (error[:, :, i] - error[:, :, without]).mean((1, 2))  # [documents]
            row["error_against_none"] = round(difference.mean().item(), 5)
            row["error_against_none_se"] = standard_error(difference)
        row["by_file"] = {}
        for file in dict.fromkeys(files):
            chosen = [j for j, name in enumerate(files) if name == file]
            row["by_file"][file] = {"mass": round(mass[chosen, :, i].mean().item(), 5)}
            if point.output:
                row["by_file"][file]["error"] = round(error[chosen, :, i].mean().item(), 5)
        rows.append(row)
    settings = {
        "model": args.model,
        "dtype": args.dtype,
        "length": length,
        "documents": {file: files.count(file) for file in dict.fromkeys(files)},
        "queries_per_document": len(positions),
        "positions": [start, length],
        "layers": sorted(layers),
        "heads": shape.num_heads,
        "bytes_dense": bytes_read(None, length, shape.head_size),
    }
    result = {**report.header("fidelity", settings), "rows": rows}
    save(result)
    return result


def table(result: dict[str, Any]) -> str:
    """Short table of a report."""
    lines = [f"{'variant':44} {'bytes':>8} {'mass':>7} {'worst':>7} {'error':>7} {'- none':>8} {'+-':>7}"]
    for row in result["rows"]:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1024:.0f}K"
        name = row["variant"] if row["bytes"] else f"{row['variant']} budget={row['budget']}"
        line = f"{name:44} {size:>8} {row['mass']:7.3f} {row['mass_worst_decile']:7.3f}"
        line += f" {row['error']:7.4f}" if "error" in row else ""
        line += f" {row['error_against_none']:+8.4f}" if "error_against_none" in row else ""
        line += f" {row['error_against_none_se']:7.4f}" if row.get("error_against_none_se") else ""
        lines.append(line)
    return "\n".join(lines)
