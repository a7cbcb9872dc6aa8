"""What prompts lose whose tokens share their selection by tiles, on two models, beside what a kernel would take.

    python benchmarks/prompt_selection.py --text prose.txt dialogue.txt code.txt legal.txt \
        --models "gemma3-270m=$(spla-model gemma3-270m)" "smollm2-135m=$(spla-model smollm2)" \
        --output benchmarks/results/prompt_selection_h200.json

Losses as in `two_models.py`, whose documents these are: above dense attention, in float32, of all layers of full
attention, by the algorithm (`spla_backend/algorithm/tiles.py`) and no kernel. All positions select where a variant
leaves something out; only `dense_below` says otherwise. Milliseconds are no measurement but arithmetic
(`prompt_costs.py`), of one layer of the 8B shape. Minutes on a GPU. On two CPU cores ten minutes or more for a variant
and document of 8192 tokens: `--contexts`, `--variants` and fewer texts choose. The report is written after every
variant; what it holds is not measured again, and its milliseconds are made anew.

A variant is what an engine would be given (`spla_backend/options.py`), and besides: `tile`, tokens that share a
selection; `tile_step`, every how many-th of them is scored; `candidate_tile`, tokens that share their candidates, 0 for
the tile; `fine_dtype`, in what the fine level multiplies; `dense_below`, the position from which tokens select;
`chunk`, tokens a chunk that the prompt comes in, 0 for all of it. Milliseconds take no notice of `chunk`.
"""

import itertools
import json
import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from prompt_costs import predicted
from two_models import FIRST, PAGE_SIZE, arguments, chosen, missing

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.evaluate import report
from spla_backend.evaluate.capture import AttentionInputs
from spla_backend.evaluate.fidelity import attention_in_pieces
from spla_backend.evaluate.variants import ModelShape, Variant, layers_of
from spla_backend.options import SplaOptions

PROMPT = {"tile": 1, "tile_step": 1, "candidate_tile": 0, "fine_dtype": "auto", "dense_below": 0, "chunk": 0}
"""What a variant has besides options, and its defaults."""
PARAMETERS = ("tile", "tile_step", "candidate_tile", "fine_dtype")
"""Of these, what the algorithm's parameters hold."""
ONE = {"tile": 32, "budget": 2048, "fine_block_size": 0, "statistics_dtype": "auto"}
TWO = {**ONE, "fine_block_size": 16, "candidates": 8192, "fine_source": "keys"}
SHARED = {**TWO, "candidate_tile": 64, "statistics_dtype": "fp8"}
VARIANTS: dict[str, dict[str, Any]] = {
    "token, 2048 of 64": {**ONE, "tile": 1},
    **{f"tile {t}, 2048 of 64": {**ONE, "tile": t} for t in (16, 32, 64)},
    **{f"tile 32, {b} of 64": {**ONE, "budget": b} for b in (4096, 8192)},
    **{f"tile 32, {b} of 64, no residual": {**ONE, "budget": b, "residual": "none"} for b in (2048, 4096, 8192)},
    **{f"tile {t}, x4, 2048 of 16": {**TWO, "tile": t} for t in (16, 32, 64)},
    **{f"tile 32, x{c}, 2048 of 16": {**TWO, "candidates": 2048 * c} for c in (2, 3, 8)},
    **{
        f"tile 32, x{c}, 2048 of {f}": {**TWO, "candidates": 2048 * c, "fine_block_size": f}
        for c in (4, 8)
        for f in (32, 64)
    },
    **{f"tile 64, x4, 2048 of {f}": {**TWO, "tile": 64, "fine_block_size": f} for f in (32, 64)},
    **{f"tile 32, x{c}, 2048 of 16, fp8": {**TWO, "candidates": 2048 * c, "fine_dtype": "fp8"} for c in (4, 8)},
    "tile 32, x4, 2048 of 16, bf16": {**TWO, "fine_dtype": "bf16"},
    **{f"tile 32, x{c}, 2048 of 16, no residual": {**TWO, "candidates": 2048 * c, "residual": "none"} for c in (4, 8)},
    **{f"tile {t}, mean, x4, 2048 of 16": {**TWO, "tile": t, "selector": "mean"} for t in (32, 64)},
    **{
        f"tile {t}, every {n}, x4, 2048 of 16": {**TWO, "tile": t, "tile_step": n}
        for t, n in ((32, 2), (32, 4), (64, 2), (64, 4), (64, 8))
    },
    "tile 64, every 4, x8, 2048 of 16": {**TWO, "tile": 64, "tile_step": 4, "candidates": 16384},
    **{
        f"tile 64, every 4, {name}, x4, 2048 of 16": {**TWO, "tile": 64, "tile_step": 4, **change}
        for name, change in (
            ("mean", {"selector": "mean"}),
            ("no residual", {"residual": "none"}),
            ("fp8 statistics", {"statistics_dtype": "fp8"}),
        )
    },
    "tile 64, every 2, 2048 of 64": {**ONE, "tile": 64, "tile_step": 2},
    "tile 32, every 4, x6, 2048 of 16": {**TWO, "tile": 32, "tile_step": 4, "candidates": 12288},
    "tile 32, every 4, mean, x4, 2048 of 16": {**TWO, "tile": 32, "tile_step": 4, "selector": "mean"},
    "tile 16, every 4, x4, 2048 of 16": {**TWO, "tile": 16, "tile_step": 4},
    "tile 32, x4, 1024 of 16": {**TWO, "budget": 1024, "candidates": 4096},
    "tile 32, x8, 1024 of 16": {**TWO, "budget": 1024},
    "tile 32, x2, 4096 of 16": {**TWO, "budget": 4096},
    "tile 32, x4, 2048 of 16, chunks of 1000": {**TWO, "chunk": 1000},
    "tile 32, x4, 2048 of 16, chunks of 20": {**TWO, "chunk": 20},
    **{
        f"tile {t}, every {n}, x4, 2048 of 16, dense below 8192": {
            **TWO,
            "tile": t,
            "tile_step": n,
            "statistics_dtype": "fp8",
            "dense_below": 8192,
        }
        for t, n in ((32, 1), (32, 2), (32, 4), (64, 4))
    },
    **{
        f"tile 32, every {n}, candidates of 64, x{c}, 2048 of 16, dense below 8192": {
            **SHARED,
            "tile_step": n,
            "candidates": 2048 * c,
            "dense_below": 8192,
        }
        for n, c in ((2, 4), (4, 4), (4, 6))
    },
    # What the kernels of a GPU compute, from the first position that leaves something out.
    **{
        f"tile 32, every 4, candidates of 64, 8192 candidates, {b} of 16": {
            **SHARED,
            "budget": b,
            "tile_step": 4,
        }
        for b in (2048, 1024)
    },
}


class Prompt:
    """Attention of a prompt in place of a model's.

    Args:
        variant: As in `VARIANTS`.
        shape: The model.
    """

    def __init__(self, variant: dict[str, Any], shape: ModelShape) -> None:
        options = {name: value for name, value in variant.items() if name not in PROMPT}
        prompt = PROMPT | {name: value for name, value in variant.items() if name in PROMPT}
        changes = {name: prompt[name] for name in PARAMETERS}
        layers = layers_of(Variant("", options), PAGE_SIZE, shape)
        self.layers: dict[int, SplaParameters] = {i: replace(params, **changes) for i, params in layers.items()}
        self.dense_below, self.chunk = prompt["dense_below"], prompt["chunk"]

    def __call__(self, inputs: AttentionInputs) -> torch.Tensor | None:
        if inputs.layer not in self.layers:
            return None
        params, length = self.layers[inputs.layer], inputs.q.shape[1]
        # Tiles within what is attended to whole are dense anyway.
        dense = max(self.dense_below, params.whole_tokens) // params.coarse_tile * params.coarse_tile
        if dense >= length:
            return None
        chunk = self.chunk or length
        edges = [0, dense, *range((dense // chunk + 1) * chunk, length, chunk), length]
        pieces = [(start, end, None if end <= dense else params) for start, end in itertools.pairwise(edges)]
        return attention_in_pieces(inputs, pieces)


def costs(variant: dict[str, Any]) -> dict[str, Any]:
    """Predicted milliseconds of a variant; none of selection by token, whose kernels were measured."""
    options = SplaOptions.from_sources({name: value for name, value in variant.items() if name not in PROMPT})
    prompt = PROMPT | variant
    if prompt["tile"] == 1:
        return {}
    params = replace(options.parameters(PAGE_SIZE), **{name: prompt[name] for name in PARAMETERS})
    return predicted(params, prompt["dense_below"])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    longest = max((len(row["variant"]) for row in rows), default=0)
    lines = [
        f"{'model':14} {'context':>7} {'variant':{longest}} {'128K':>6} {'in turn':>7} {'32K':>6} {'in turn':>7} "
        f"{'from':>6} {'loss':>8} {'+-':>7}  by document"
    ]
    for row in rows:
        fields = ("ms_128k", "in_turn_ms_128k", "ms_32k", "in_turn_ms_32k", "selects_from")
        ms = " ".join(f"{row.get(field, ''):>{width}}" for field, width in zip(fields, (6, 7, 6, 7, 6), strict=True))
        documents = "  ".join(f"{name} {loss:+.4f}" for name, loss in row["documents"].items())
        lines.append(
            f"{row['model']:14} {row['context']:7} {row['variant']:{longest}} {ms} {row['loss']:+8.4f} "
            f"{row['error']:7.4f}  {documents}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, str(list(VARIANTS)))
    args = parser.parse_args()
    variants = chosen(parser, args, VARIANTS)
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []

    def save() -> None:
        settings = {
            "texts": [Path(file).name for file in args.text],
            "page_size": PAGE_SIZE,
            "variants": {row["variant"]: VARIANTS[row["variant"]] for row in rows},
        }
        head = report.header("prompt_selection", settings, "benchmarks/prompt_selection.py")
        with_costs = [row | costs(VARIANTS[row["variant"]]) for row in rows]
        report.write({**head, "rows": with_costs}, args.output)

    for model_name, shape, measurement, name in missing(args, rows, list(variants), operator.itemgetter("variant")):
        context = measurement.context
        compared = measurement.compared(measurement.losses(Prompt(variants[name], shape)))
        rows.append({"model": model_name, "context": context, "from": FIRST[context], "variant": name, **compared})
        save()
    save()
    print(table(json.loads(args.output.read_text())["rows"]))


if __name__ == "__main__":
    main()
