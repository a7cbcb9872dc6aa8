"""`spla-eval perplexity`: loss on long text, by position, dense and SPLA side by side.

Through the engine, or through transformers with the algorithm in place of its attention: for what has no kernel yet.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from ..algorithm.parameters import SplaParameters
from . import engines, report
from .capture import CapturingModel, Visit
from .documents import cut_documents, load_tokenizer
from .fidelity import attention
from .variants import (
    DENSE,
    ModelShape,
    Variant,
    exact_up_to,
    layers_of,
    mean_bytes_read,
    parse_variants,
    without_residual,
)

SEGMENT = 128
"""Neighbouring tokens whose mean loss counts as one observation: losses of neighbours are not independent."""


def buckets_of(edges: Sequence[int] | None, length: int) -> list[tuple[int, int]]:
    """Buckets `(start, end)` of positions of the predicted tokens.

    Args:
        edges: Where buckets begin and end; None doubles from an eighth of the length.
        length: Tokens a document; the last position is `length - 1`, and position 0 predicts nothing.

    Raises:
        ValueError: Edges outside the document, or in no ascending order.
    """
    if edges is None:
        edges = [1, length // 8, length // 4, length // 2, length]
    elif edges[-1] < length:
        edges = [*edges, length]
    if len(edges) < 2 or list(edges) != sorted(set(edges)) or edges[-1] > length or edges[0] < 1:
        raise ValueError(f"--buckets must ascend from 1 or more to at most {length}, the length, not {list(edges)}")
    return list(itertools.pairwise(edges))


def bucket_mean_and_error(losses: Sequence[Sequence[float]], start: int, end: int) -> tuple[float, float | None]:
    """Mean and standard error of what lies at positions `start .. end - 1`.

    Args:
        losses: By document, of the tokens at positions 1, 2, ...
        start: First position, at least 1.
        end: Behind the last position.

    Returns:
        The mean over tokens, and the standard error of a mean over segments of `SEGMENT` tokens, None for a single
        segment.
    """
    pieces = [torch.tensor(document[start - 1 : end - 1], dtype=torch.float64) for document in losses]
    mean = torch.cat(pieces).mean().item()
    segments = torch.stack([segment.mean() for piece in pieces for segment in piece.split(SEGMENT)])
    if len(segments) < 2:
        return mean, None
    return mean, (segments.std() / math.sqrt(len(segments))).item()


def compare(
    losses: Sequence[Sequence[float]], dense: Sequence[Sequence[float]], start: int, end: int
) -> dict[str, Any]:
    """Loss, perplexity and the paired difference to dense in a bucket of positions, arguments as
    `bucket_mean_and_error`."""
    loss, _ = bucket_mean_and_error(losses, start, end)
    differences = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(losses, dense, strict=True)]
    difference, error = bucket_mean_and_error(differences, start, end)
    return {
        "start": start,
        "end": end,
        "tokens": len(losses) * (end - start),
        "loss": round(loss, 5),
        "perplexity": round(math.exp(loss), 4),
        "difference": round(difference, 5),
        "difference_se": None if error is None else round(error, 5),
    }


class _Engines:
    """Log-probabilities from vLLM: an engine a variant, one after the other.

    Prompts are what is measured, so that their tokens select like decoded ones (`prefill_dense_below` is 0) where an
    option set does not say otherwise.
    """

    def __init__(self, args: argparse.Namespace, shape: ModelShape, length: int) -> None:
        self.args, self.length = args, length
        # Logits of a whole long prompt at once would take gigabytes.
        self.arguments = {"max_num_batched_tokens": 2048} | args.engine_args

    def __call__(self, variant: Variant, documents: Sequence[Sequence[int]]) -> list[list[float]]:
        if variant.options is not None:
            variant = replace(variant, options={"prefill_dense_below": 0, **variant.options})
        with engines.start(self.args.model, variant, self.args.page_size, self.length + 1, self.arguments) as llm:
            return engines.prompt_logprobs(llm, documents, variant.name)


class _Transformers:
    """Log-probabilities from transformers, in float32 or the dtype among the engine's arguments."""

    def __init__(self, args: argparse.Namespace, shape: ModelShape, length: int) -> None:
        unknown = set(args.engine_args) - {"dtype"}
        if unknown:
            raise ValueError(f"--engine-args {min(unknown)} means nothing to --through transformers: leave it out")
        self.arguments = {"dtype": "float32"} | args.engine_args
        dtype = getattr(torch, self.arguments["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown dtype {self.arguments['dtype']!r}: choose float32, bfloat16 or float16")
        self.page_size, self.shape = args.page_size, shape
        self.model = CapturingModel(args.model, dtype, "cuda" if torch.cuda.is_available() else "cpu", head=True)

    def __call__(self, variant: Variant, documents: Sequence[Sequence[int]]) -> list[list[float]]:
        visit: Visit | None = None
        if variant.options is not None:
            layers = layers_of(variant, self.page_size, self.shape)
            visit = partial(attention, params=layers, learned=self.shape.learned(variant.options))
        bar = tqdm(documents, desc=variant.name, unit="document")
        return [self.model.logprobs(tokens, visit) for tokens in bar]


def run(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The report of `spla-eval perplexity`; `save` gets what there is of it after every engine."""
    shape = ModelShape.of(args.model)
    variants = [DENSE, *parse_variants(args.options, args.page_size, shape)]
    # A prompt needs room for the one token that the engine generates behind it.
    length = min(args.length, shape.max_position - 1)
    buckets = buckets_of(args.buckets, length)
    documents = cut_documents(args.text, load_tokenizer(args.model), length, args.documents)
    tokens = [document.tokens for document in documents]
    logprobs = (_Transformers if args.through == "transformers" else _Engines)(args, shape, length)
    files = [document.file for document in documents]

    settings = {
        "model": args.model,
        "length": length,
        "documents": {file: files.count(file) for file in dict.fromkeys(files)},
        "page_size": args.page_size,
        "through": args.through,
        "engine_args": logprobs.arguments,
        "variants": {variant.name: variant.options for variant in variants},
        "segment": SEGMENT,
    }
    layers = {variant.name: layers_of(variant, args.page_size, shape) for variant in variants}
    losses: dict[str, list[list[float]]] = {}
    warnings: list[str] = []
    result = {**report.header("perplexity", settings), "warnings": warnings}
    for variant in variants:
        losses[variant.name] = [[-x for x in document] for document in logprobs(variant, tokens)]
        result["rows"] = rows_of(losses, layers, files, buckets, shape)
        result["segments"] = segments_of(losses, files)
        if layers[variant.name]:
            exact = exact_up_to(layers[variant.name])
            if looks_dense(losses[variant.name], losses[DENSE.name], exact):
                warnings.append(
                    f"{variant.name} is as close to dense beyond its budget as within: was its prefill dense?"
                )
        save(result)
    return result


def looks_dense(losses: Sequence[Sequence[float]], dense: Sequence[Sequence[float]], exact: int) -> bool:
    """Whether a variant is as close to dense beyond what it attends to whole as within, where nothing but rounding
    tells them apart: a sign that a kernel attended to the whole prompt.

    Args:
        losses: By document, of the tokens at positions 1, 2, ...
        dense: The same of dense attention.
        exact: Tokens up to which the variant attends to everything.
    """
    distances = [[abs(a - b) for a, b in zip(x, y, strict=True)] for x, y in zip(losses, dense, strict=True)]
    length = len(distances[0]) + 1
    if length < 2 * exact:
        return False
    within, _ = bucket_mean_and_error(distances, 1, exact)
    beyond, _ = bucket_mean_and_error(distances, 2 * exact, length)
    return beyond <= 1.5 * within


def rows_of(
    losses: Mapping[str, list[list[float]]],
    layers: Mapping[str, Mapping[int, SplaParameters]],
    files: Sequence[str],
    buckets: Sequence[tuple[int, int]],
    shape: ModelShape,
) -> list[dict[str, Any]]:
    """Rows of a report: every variant, all files together and each by itself, every bucket.

    Args:
        losses: By variant and document, of the tokens at positions 1, 2, ...; the dense variant among them.
        layers: What each variant computes, by layer; those that are not named are dense.
        files: Of each document.
        buckets: Positions `(start, end)`.
        shape: The model.
    """
    rows = []
    for name, mine in losses.items():
        without = None
        if any(params.residual != "none" for params in layers[name].values()):
            wanted = {i: without_residual(params) for i, params in layers[name].items()}
            without = next((other for other in losses if layers[other] == wanted), None)
        for file in dict.fromkeys(["all", *files]):
            chosen = [i for i, of in enumerate(files) if file in ("all", of)]
            for start, end in buckets:
                num_bytes = mean_bytes_read(layers[name], end, shape)
                row = {"variant": name, "file": file, "bytes": num_bytes}
                row |= compare([mine[i] for i in chosen], [losses[DENSE.name][i] for i in chosen], start, end)
                if without is not None:
                    pair = compare([mine[i] for i in chosen], [losses[without][i] for i in chosen], start, end)
                    row["against_none"], row["against_none_se"] = pair["difference"], pair["difference_se"]
                rows.append(row)
    return rows


def segments_of(losses: Mapping[str, list[list[float]]], files: Sequence[str]) -> list[dict[str, Any]]:
    """Mean losses of segments by variant and document, arguments as `rows_of`."""
    return [
        {"variant": name, "file": file, "losses": segment_means(document)}
        for name, of_documents in losses.items()
        for file, document in zip(files, of_documents, strict=True)
    ]


def segment_means(losses: Sequence[float]) -> list[float]:
    """Means over segments of the tokens at positions 1, 2, ...: enough to compare any two variants later."""
    return [round(segment.mean().item(), 5) for segment in torch.tensor(losses, dtype=torch.float64).split(SEGMENT)]


def table(result: dict[str, Any]) -> str:
    """Short table of a report."""
    lines = [
        f"{'variant':44} {'positions':>12} {'bytes':>7} {'loss':>7} {'ppl':>8} {'- dense':>9} {'+-':>7} {'ppl %':>7}"
        f" {'- none':>8} {'+-':>7}"
    ]
    for row in result["rows"]:
        if row["file"] != "all":
            continue
        error = "" if row["difference_se"] is None else f"{row['difference_se']:.4f}"
        positions = f"{row['start']}-{row['end'] - 1}"
        line = (
            f"{row['variant']:44} {positions:>12} {row['bytes'] / 1024:6.0f}K {row['loss']:7.4f} "
            f"{row['perplexity']:8.3f} {row['difference']:+9.4f} {error:>7} {100 * math.expm1(row['difference']):+7.2f}"
        )
        if "against_none" in row:
            line += f" {row['against_none']:+8.4f} {row['against_none_se'] or math.nan:7.4f}"
        lines.append(line)
    return "\n".join([*lines, *(f"warning: {text}" for text in result.get("warnings", []))])
