"""`spla-eval tasks`: scores of generated tasks through the engine, by length, dense and SPLA side by side."""

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from . import engines, report
from .documents import load_tokenizer
from .tasks import make_sample, score
from .variants import DENSE, ModelShape, layers_of, mean_bytes_read, parse_variants


def mean_and_error(scores: list[float]) -> tuple[float, float | None]:
    """Mean of scores and its standard error, None for a single one."""
    mean = statistics.fmean(scores)
    return mean, statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None


def run(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The report of `spla-eval tasks`; `save` gets what there is of it after every engine."""
    shape = ModelShape.of(args.model)
    variants = [DENSE, *parse_variants(args.options, args.page_size, shape)]
    too_long = [length for length in args.lengths if length > shape.max_position]
    if too_long:
        raise ValueError(f"{args.model!r} takes at most {shape.max_position} tokens, less than --lengths {too_long[0]}")
    tokenizer = load_tokenizer(args.model)

    def encode(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    cells = [(task, length) for length in args.lengths for task in args.tasks]
    samples = [
        ((task, length), make_sample(task, length, args.seed + i, lambda text: len(encode(text))))
        for task, length in tqdm(cells, desc="making samples", unit="task")
        for i in range(args.samples)
    ]
    prompts = [encode(sample.prompt) for _, sample in samples]
    max_tokens = [sample.max_tokens for _, sample in samples]

    settings = {
        "model": args.model,
        "tasks": args.tasks,
        "lengths": args.lengths,
        "samples": args.samples,
        "seed": args.seed,
        "page_size": args.page_size,
        "engine_args": args.engine_args,
        "variants": {variant.name: variant.options for variant in variants},
    }
    answers = [{"task": s.task, "length": cell[1], "answers": s.answers} for cell, s in samples]
    rows: list[dict[str, Any]] = []
    completions: list[dict[str, Any]] = []
    dense: dict[tuple[str, int], list[float]] = {}
    result = {**report.header("tasks", settings), "rows": rows, "samples": answers, "completions": completions}
    for variant in variants:
        with engines.start(args.model, variant, args.page_size, max(args.lengths), args.engine_args) as llm:
            texts = engines.complete(llm, prompts, max_tokens, variant.name)
        scores: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
        for (cell, sample), text in zip(samples, texts, strict=True):
            scores[cell].append(score(text, sample.answers))
        dense = dense or scores
        completions.append({"variant": variant.name, "texts": texts})
        layers = layers_of(variant, args.page_size, shape)
        for task, length in cells:
            mean, error = mean_and_error(scores[task, length])
            pairs = zip(scores[task, length], dense[task, length], strict=True)
            difference, difference_error = mean_and_error([a - b for a, b in pairs])
            rows.append(
                {
                    "variant": variant.name,
                    "task": task,
                    "length": length,
                    "bytes": mean_bytes_read(layers, length, shape),
                    "score": _round(mean),
                    "score_se": _round(error),
                    "difference": _round(difference),
                    "difference_se": _round(difference_error),
                }
            )
        save(result)
    return result


def _round(x: float | None) -> float | None:
    return None if x is None else round(x, 4)


def table(result: dict[str, Any]) -> str:
    """Short table of a report: a line for each variant and length, a column for each task."""
    tasks = result["settings"]["tasks"]
    lines = [f"{'variant':44} {'length':>7} " + " ".join(f"{task:>11}" for task in [*tasks, "mean"])]
    cells = {(row["variant"], row["length"], row["task"]): row["score"] for row in result["rows"]}
    for variant, length in dict.fromkeys((row["variant"], row["length"]) for row in result["rows"]):
        scores = [cells[variant, length, task] for task in tasks]
        numbers = " ".join(f"{x:11.3f}" for x in [*scores, statistics.fmean(scores)])
        lines.append(f"{variant:44} {length:7} {numbers}")
    return "\n".join(lines)
