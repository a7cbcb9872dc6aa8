"""Where the bytes of a selection are best spent: statistics in fp8 and of low rank, budgets by layer and head.

    python benchmarks/experiments/statistics_and_budgets.py fidelity --text prose.txt code.py --report R.json
    python benchmarks/experiments/statistics_and_budgets.py fit --text other_prose.txt other_code.py --report R.json
    python benchmarks/experiments/statistics_and_budgets.py loss --text prose.txt code.py --report R.json
    python benchmarks/experiments/statistics_and_budgets.py plot --report R.json --plot R.png

All of it in float32 with the algorithm's own code, nothing of it has a kernel. Every stage replaces its part of the
report, except that `loss` adds the variants and documents that are not there yet.

Statistics: vectors in fp8 (e4m3, one bfloat16 scale each), and the covariance of a block's keys as its `r` greatest
eigenvectors beside the diagonal of what they leave over. `fidelity` measures them all, at one budget.

Budgets, all of the same sum over layers and kv heads: one for all; fitted to the captured mass; fitted to the loss, by
kv head or by layer; top-p. The loss is estimated to second order: what a budget does to the output of a kv head,
`delta`, costs `E (g . delta)^2 / 2` nats, where `g` is the gradient of the loss of tokens drawn from the model itself
(a Fisher information, hence the Kullback-Leibler divergence from the dense model). `fit` looks at the last
`--tail` of each document, where one backward pass gives `g` for all layers.

`loss` reads a document densely up to its last `--tail`, as a GPU's prefill does below 16384 tokens, and selects for
every token of those.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.selectors import (
    KMeans2RemSelector,
    MeanSelector,
    RemSelector,
    Selector,
    get_selector,
    register_selector,
    selector_names,
)
from spla_backend.algorithm.sequence import spla_attention, unselected_blocks
from spla_backend.calibrate.budgets import allocate
from spla_backend.calibrate.costs import Continued, gradients, head_groups, loss_of
from spla_backend.evaluate import report
from spla_backend.evaluate.capture import AttentionInputs, CapturingModel, Visit
from spla_backend.evaluate.documents import Document, cut_documents, load_tokenizer
from spla_backend.evaluate.fidelity import Point, measure, sample_positions, standard_error, summary
from spla_backend.evaluate.perplexity import segment_means
from spla_backend.evaluate.variants import ModelShape
from spla_backend.models import gguf

PAGE = 64
BUDGET = 1024
GRID = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Budgets in blocks of 64 that `fit` looks at: from the forced ones to half of 8192 tokens."""
TOP_P = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.985)
ELEMENTS = 1 << 22  # weights of pairs of tokens held at a time, which stay in a CPU's caches
VARIANTS = [
    *("mean:64", "rem-fp8:64", "rem-lr1-fp8:64", "rem:64", "rem-lr2-fp8:64", "km2-rem-fp8:64", "rem-lr4-fp8:64"),
    *("km2-rem:64", "rem-lr8-fp8:64", "rem-lr64:64", "mean-fp8:32", "mean:32", "rem-fp8:32", "rem-lr1-fp8:32"),
    *("rem:32", "rem-lr2-fp8:32", "km2-rem-fp8:32", "rem-lr4-fp8:32", "mean-fp8:16", "mean:16", "rem-fp8:16"),
    *("rem-lr1-fp8:16", "rem:16", "rem-lr2-fp8:16", "km2-rem-fp8:16"),
]
TYPES = {"mean": MeanSelector, "rem": RemSelector, "km2-rem": KMeans2RemSelector}


def fp8(x: torch.Tensor) -> torch.Tensor:
    """`x [..., n]` rounded to e4m3, with one bfloat16 scale for each vector."""
    scale = (x.abs().amax(-1, keepdim=True) / 448).bfloat16().to(x.dtype).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale


class Fp8(Selector):
    """Before another selector's class: its vectors in fp8. Counts stay: they are small integers."""

    def statistics(self, keys: torch.Tensor) -> torch.Tensor:
        exact = super().statistics(keys)  # type: ignore[safe-super]
        vectors = exact.shape[-1] // keys.shape[-1] * keys.shape[-1]
        rounded = fp8(exact[..., :vectors].unflatten(-1, (-1, keys.shape[-1]))).flatten(-2)
        return torch.cat([rounded, exact[..., vectors:]], -1)


class LowRank(RemSelector):
    """`rem` on the mean, the `rank` greatest eigenvectors of the covariance (times the roots of their eigenvalues), and
    the diagonal of what they leave over."""

    rank: int

    def width(self, head_size: int) -> int:
        return (2 + self.rank) * head_size

    def statistics(self, keys: torch.Tensor) -> torch.Tensor:
        block = keys.shape[-2]
        mean = keys.mean(-2, keepdim=True)
        centered = (keys - mean) / math.sqrt(block)
        # The eigenvectors of X^T X are X^T times those of X X^T, which is the smaller matrix.
        vectors = torch.linalg.eigh(centered @ centered.mT).eigenvectors[..., -self.rank :]
        factors = vectors.mT @ centered  # [..., rank, d]
        rest = (centered.square().sum(-2) - factors.square().sum(-2)).clamp(min=0)
        factors = torch.nn.functional.pad(factors, (0, 0, 0, self.rank - factors.shape[-2]))
        return torch.cat([mean.squeeze(-2), rest, factors.flatten(-2)], -1)

    def moments(self, q: torch.Tensor, statistics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, rest, factors = statistics.tensor_split((q.shape[-1], 2 * q.shape[-1]), -1)
        s2 = q.square() @ rest.mT
        for factor in factors.unflatten(-1, (self.rank, -1)).unbind(-2):
            s2 = s2 + (q @ factor.mT).square()
        return q @ mean.mT, s2


def register(name: str) -> None:
    """`mean`, `rem`, `km2-rem` or `rem-lr4`, with `-fp8` behind it or not."""
    if name in selector_names():
        return
    base, _, rank = name.removesuffix("-fp8").partition("-lr")
    kind = LowRank if rank else TYPES[base]
    bases = (Fp8, kind) if name.endswith("-fp8") else (kind,)
    register_selector(type(name, bases, {"name": name, "rank": int(rank or 0)}))


def statistics_bytes(name: str, block: int, head_size: int) -> int:
    """Bytes of a page's statistics for one kv head."""
    base, _, rank = name.removesuffix("-fp8").partition("-lr")
    vectors = {"mean": 1, "rem": 2, "km2-rem": 4}[base] + int(rank or 0)
    counts = 2 if base == "km2-rem" else 0
    of_block = vectors * (head_size + 2) + counts if name.endswith("-fp8") else 2 * (vectors * head_size + counts)
    return PAGE // block * of_block


def bytes_read(name: str, block: int, tokens: float, length: int, head_size: int) -> int:
    """What a token of one layer and kv head reads that attends to `tokens` exactly, as `spla-eval` counts."""
    state = 4 * (head_size + 2) * head_size
    pages = (length - 1) // PAGE
    return round(pages * statistics_bytes(name, block, head_size) + tokens * 4 * head_size + state)


def decode_us(name: str, block: int, tokens: float) -> float:
    """Least time of a layer's decode on an H200, 32 sequences of 128K tokens, 8 kv heads of size 128, at 4.2 TB/s."""
    return round(32 * 8 * bytes_read(name, block, tokens, 1 << 17, 128) / 4.2e6, 1)


def parameters(selector: str = "rem", block: int = PAGE, **more: Any) -> SplaParameters:
    register(selector)
    sizes = {"page_size": PAGE, "selection_block": block, "budget_blocks": BUDGET // block}
    return SplaParameters(**{**sizes, "selector": selector, **more})


def variant(text: str) -> tuple[str, int]:
    """`rem-lr2-fp8:32` as selector and block."""
    selector, _, block = text.partition(":")
    return selector, int(block)


def fidelity(args: argparse.Namespace, shape: ModelShape, documents: list[Document]) -> dict[str, Any]:
    """Captured mass and output error of every kind of statistics."""
    kinds = [variant(text) for text in args.variants]
    points = [Point(parameters(*kind)) for kind in kinds]
    points += [Point(parameters("rem", block, residual="none"), True, False) for block in sorted({b for _, b in kinds})]
    positions = sample_positions(args.length // 2, args.length, args.queries, args.seed)
    model, found = CapturingModel(args.model), []
    with tqdm(total=len(documents) * len(shape.attention_layers), unit="layer") as bar:
        for document in documents:
            of_layers: list[tuple[torch.Tensor, torch.Tensor]] = []

            def visit(inputs: AttentionInputs) -> None:
                of_layers.append(measure(inputs, positions, points))  # noqa: B023 - called before the next document
                bar.update()

            model.run(document.tokens, visit)
            found.append([torch.stack(x) for x in zip(*of_layers, strict=True)])
    mass, error = (torch.stack(x) for x in zip(*found, strict=True))  # [documents, layers, points, heads]
    rows = []
    for i, point in enumerate(points):
        block = point.params.selection_block
        row: dict[str, Any] = {"selector": point.selector, "block": block}
        if not point.oracle:
            row["bytes_of_page"] = statistics_bytes(point.selector, block, shape.head_size)
            row["bytes"] = bytes_read(point.selector, block, BUDGET, args.length, shape.head_size)
            row["decode_us"] = decode_us(point.selector, block, BUDGET)
        numbers = summary(mass[:, :, i], error[:, :, i])
        row |= {key: value for key, value in numbers.items() if "layer" not in key}
        row["mass_of_documents"] = [round(x, 5) for x in mass[:, :, i].mean((1, 2)).tolist()]
        rows.append(row)
    return {"fidelity": rows}


def fit(args: argparse.Namespace, shape: ModelShape, documents: list[Document]) -> dict[str, Any]:
    """Budgets by layer and kv head, and the top-p of the same mean number of blocks."""
    torch.manual_seed(args.seed)
    groups, start = shape.num_kv_heads, args.length - args.tail
    budgets = [Point(parameters(budget_blocks=n)) for n in GRID]
    shares = [Point(parameters(budget_blocks=GRID[-1], top_p=p)) for p in TOP_P]
    lost = torch.zeros(len(shape.attention_layers), groups, len(GRID))
    cost = torch.zeros_like(lost)
    blocks = torch.zeros(len(TOP_P))
    model = Continued(args.model, head=True)
    for document in tqdm(documents, unit="document"):
        positions = sample_positions(start, args.length, args.queries, args.seed)
        for inputs, gradient in tqdm(gradients(model, document.tokens, start, PAGE), unit="layer", leave=False):
            for g, (group, own) in enumerate(head_groups(inputs, gradient, positions)):
                for i, point in enumerate(budgets):
                    rest = group.select(point)
                    lost[inputs.layer, g, i] += 1 - group.captured_mass(rest, PAGE).mean()
                    cost[inputs.layer, g, i] += loss_of(group.output_change(rest, point.params), own)
                for i, point in enumerate(shares):
                    blocks[i] += (positions // PAGE + 1 - group.select(point).sum(-1)).float().mean()
    lost, cost = lost / len(documents), cost / len(documents)
    blocks /= len(documents) * len(shape.attention_layers) * groups
    mean = BUDGET // PAGE
    i = int((blocks < mean).sum())
    t = ((mean - blocks[i - 1]) / (blocks[i] - blocks[i - 1])).item()
    by_layer = allocate(cost.sum(1), GRID, mean * len(cost))[:, None].expand(-1, groups)
    by_mass, by_loss = (
        allocate(x.flatten(0, 1), GRID, mean * groups * len(x)).view(-1, groups).tolist() for x in (lost, cost)
    )
    return {
        "budgets": [
            {"budgets": "mass by head", "blocks": by_mass},
            {"budgets": "loss by head", "blocks": by_loss},
            {"budgets": "loss by layer", "blocks": by_layer.tolist()},
            {"budgets": "top-p", "top_p": round(TOP_P[i - 1] + t * (TOP_P[i] - TOP_P[i - 1]), 4)},
        ],
        "fit": [
            {"layer": layer, "lost_mass": _rounded(lost[layer]), "loss_times_1e6": _rounded(cost[layer] * 1e6)}
            for layer in range(len(shape.attention_layers))
        ],
        "top_p": [{"top_p": p, "blocks": round(n, 2)} for p, n in zip(TOP_P, blocks.tolist(), strict=True)],
    }


def _rounded(x: torch.Tensor) -> list[list[float]]:
    return [[round(y, 4) for y in row] for row in x.tolist()]


def sparse(of_layers: Sequence[Sequence[SplaParameters]], counts: list[float]) -> Visit:
    """SPLA with parameters of its own for every layer and kv head; blocks that were attended to go to `counts`."""

    def visit(inputs: AttentionInputs) -> torch.Tensor:
        mine = of_layers[inputs.layer]
        q = inputs.q.unflatten(0, (len(mine), -1))  # [groups, group, tokens, head_size]
        length, total = q.shape[2], inputs.k.shape[1]
        alike = [list(same) for _, same in itertools.groupby(range(len(mine)), key=lambda g: mine[g])]
        outputs = []
        for heads in alike:
            params, some = mine[heads[0]], slice(heads[0], heads[-1] + 1)
            k, v = inputs.k[some], inputs.v[some]
            chunk = max(16, ELEMENTS // (q[some].shape[0] * q.shape[1] * total))
            outputs.append(spla_attention(q[some].flatten(0, 1)[None], k[None], v[None], params, chunk=chunk)[0])
            if params.selection_block == PAGE:
                which = torch.arange(0, length, 64)
                positions = total - length + which
                statistics = get_selector(params.selector).statistics(k.unflatten(1, (-1, PAGE)))
                rest = unselected_blocks(q[some][:, :, which], k, statistics, positions, params)
                counts.extend((positions // PAGE + 1 - rest.sum(-1)).float().mean(-1).tolist())
        return torch.cat(outputs)

    return visit


def budgets_of(name: str, fitted: Sequence[Mapping[str, Any]], shape: ModelShape) -> list[list[SplaParameters]]:
    """By layer and kv head: what `selector:block`, or this with what `fit` called so, computes."""
    kind, _, budgets = name.partition(" ")
    selector, block = variant(kind)
    row = next((row for row in fitted if row["budgets"] == budgets), {})
    if "blocks" in row:
        return [
            [parameters(selector, block, budget_blocks=n * PAGE // block) for n in layer] for layer in row["blocks"]
        ]
    more = {"budget_blocks": GRID[-1], "top_p": row["top_p"]} if row else {}
    return [[parameters(selector, block, **more)] * shape.num_kv_heads] * len(shape.attention_layers)


def loss(
    args: argparse.Namespace,
    shape: ModelShape,
    documents: list[Document],
    written: Callable[[], dict[str, Any]],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Loss and divergence from the dense model of the ends of documents; what the report holds is not run again."""
    fitted = written().get("budgets", [])
    names = [*args.variants, *(f"rem:{PAGE} {row['budgets']}" for row in fitted if args.budgets)]
    variants = {name: budgets_of(name, fitted, shape) for name in names}
    model, start = Continued(args.model, head=True), args.length - args.tail
    # The first of every file, then the second: a run that is stopped has seen all files.
    of_file = {file: [x for x in documents if x.file == file] for file in dict.fromkeys(x.file for x in documents)}
    documents = [x for row in itertools.zip_longest(*of_file.values()) for x in row if x is not None]
    with tqdm(total=len(documents) * len(variants), unit="run") as bar, torch.inference_mode():
        for document in documents:
            which = Path(document.file).name, document.tokens[:8]
            done = {row["variant"] for row in written().get("segments", []) if document_of(row) == which}
            if done >= set(variants):
                continue
            model.begin(document.tokens[:start])
            wanted = torch.tensor(document.tokens[start + 1 :])[:, None]
            dense = model.go_on(document.tokens[start:], None)[:-1].log_softmax(-1)
            for name, of_layers in variants.items():
                if name in done:
                    continue
                bar.set_description(f"{document.file} {name}")
                counts: list[float] = []
                logits = model.go_on(document.tokens[start:], sparse(of_layers, counts))[:-1]
                losses, divergence = [], []
                for p, piece, ids in zip(dense.split(512), logits.split(512), wanted.split(512), strict=True):
                    mine = piece.log_softmax(-1)
                    losses += (p.gather(-1, ids) - mine.gather(-1, ids))[:, 0].tolist()
                    divergence += (p.exp() * (p - mine)).sum(-1).tolist()
                row = {"variant": name, "file": which[0], "first_tokens": which[1]}
                row["blocks"] = round(sum(counts) / len(counts), 3) if counts else None
                row |= {"loss": segment_means(losses), "divergence": segment_means(divergence)}
                segments = [*written().get("segments", []), row]
                save({"loss": loss_rows(segments, args.length, shape.head_size), "segments": segments})
                bar.update()


def document_of(row: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """What tells the document of a row of `segments` from others."""
    return row["file"], tuple(row["first_tokens"])


def rounded_mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    x = torch.tensor(values, dtype=torch.float64)
    return round(x.mean().item(), 5), standard_error(x)


def loss_rows(segments: Sequence[Mapping[str, Any]], length: int, head_size: int) -> list[dict[str, Any]]:
    """Means over segments of 128 tokens above dense with their standard errors, and above `rem:64`, paired; what share
    of the default's loss a document keeps."""
    rows = []
    of_default = {document_of(row): row for row in segments if row["variant"] == f"rem:{PAGE}"}
    for name in dict.fromkeys(row["variant"] for row in segments):
        mine = [row for row in segments if row["variant"] == name]
        selector, block = variant(name.partition(" ")[0])
        blocks = [row["blocks"] for row in mine if row["blocks"] is not None]
        tokens = PAGE * sum(blocks) / len(blocks) if blocks else BUDGET
        row: dict[str, Any] = {"variant": name, "documents": len(mine), "tokens": round(tokens, 1)}
        row["bytes_of_page"] = statistics_bytes(selector, block, head_size)
        row["bytes"] = bytes_read(selector, block, tokens, length, head_size)
        row["decode_us"] = decode_us(selector, block, tokens)
        pairs = [(x, of_default[document_of(x)]) for x in mine if document_of(x) in of_default]
        for key in ("loss", "divergence"):
            row[key], row[f"{key}_se"] = rounded_mean_and_error([x for document in mine for x in document[key]])
            if name != f"rem:{PAGE}" and pairs:
                differences = [x - y for a, b in pairs for x, y in zip(a[key], b[key], strict=True)]
                row[f"{key}_against_default"], row[f"{key}_against_default_se"] = rounded_mean_and_error(differences)
                row[f"{key}_shares"] = [round(sum(a[key]) / sum(b[key]), 3) for a, b in pairs]
        row["loss_of_documents"] = [rounded_mean_and_error(document["loss"])[0] for document in mine]
        rows.append(row)
    return rows


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Captured mass and loss against bytes; budgets are stars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    rows = [row for row in found["fidelity"] if "bytes_of_page" in row]
    mass = [(f"{row['selector']}:{row['block']}", row["bytes_of_page"], row["mass"], None) for row in rows]
    losses = []
    for row in found["loss"]:
        shares = row.get("loss_shares", [1.0])
        mean = sum(shares) / len(shares)
        if len(shares) > 1 or row["variant"] == f"rem:{PAGE}":
            losses.append((row["variant"], row["bytes"] / 1024, mean, [[mean - min(shares)], [max(shares) - mean]]))
    for axes, points in ((left, mass), (right, losses)):
        for name, x, y, error in points:
            selector, block = variant(name.partition(" ")[0])
            marker = "*" if " " in name else {64: "o", 32: "s", 16: "D"}[block]
            color = (
                f"C{next(i for i, kind in enumerate(('mean', 'rem-lr', 'rem', 'km2')) if selector.startswith(kind))}"
            )
            face = color if selector.endswith("fp8") else "none"
            axes.errorbar(x, y, error, marker=marker, color=color, markerfacecolor=face, elinewidth=0.5, capsize=2)
            axes.annotate(name.removesuffix(f":{block}"), (x, y), fontsize=6, xytext=(4, 3), textcoords="offset points")
        axes.grid(alpha=0.3)
    left.set(xlabel="bytes of a page's statistics, one kv head of size 64", xscale="log", xlim=(100, 3000))
    left.set(ylabel="attention mass captured", title="circles, squares, diamonds: blocks of 64, 32, 16; filled: fp8")
    right.set(xlabel="KiB read a token, layer and kv head", title="stars: budgets by layer, head or token")
    right.set(ylabel=f"share of the loss of rem:{PAGE}, mean and range of the documents", ylim=(0, None))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["fidelity", "fit", "loss", "plot"])
    parser.add_argument("--model", help="folder of the model; default: SmolLM2-135M-Instruct")
    parser.add_argument("--text", nargs="+", default=[], help="text files")
    parser.add_argument("--documents", type=int, default=1, help="documents a file (%(default)s)")
    parser.add_argument("--length", type=int, default=8192, help="tokens a document, whole pages (%(default)s)")
    parser.add_argument("--queries", type=int, default=64, help="a document, of fidelity and fit (%(default)s)")
    parser.add_argument("--tail", type=int, default=1024, help="last tokens, that fit and loss look at (%(default)s)")
    parser.add_argument("--variants", nargs="*", default=VARIANTS, help="selector:block, of fidelity and loss")
    parser.add_argument("--budgets", action="store_true", help="loss: also the budgets that fit found")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    def written() -> dict[str, Any]:
        return json.loads(args.report.read_text()) if args.report.exists() else {}

    if args.stage == "plot":
        plot(written(), args.plot or args.report.with_suffix(".png"))
        return
    args.model = args.model or str(gguf.packaged("smollm2"))
    shape = ModelShape.of(args.model)
    documents = cut_documents(args.text, load_tokenizer(args.model), args.length, args.documents)
    head = report.header(
        args.stage,
        {"length": args.length, "tail": args.tail, "seed": args.seed},
        f"benchmarks/experiments/{Path(sys.argv[0]).name}",
    )

    def save(part: dict[str, Any]) -> None:
        old = written()  # now, not at the start: stages may run side by side
        stages = old.get("stages", {})
        before = stages.get(args.stage, head)
        if args.stage == "loss":  # joins what earlier runs found
            head["earlier"] = [
                x for x in dict.fromkeys([*before.get("earlier", []), before["command"]]) if x != head["command"]
            ]
        stages[args.stage] = head
        report.write({"kind": "statistics and budgets", **old, "stages": stages, **part}, args.report)

    if args.stage == "loss":
        loss(args, shape, documents, written, save)
    else:
        save({"fidelity": fidelity, "fit": fit}[args.stage](args, shape, documents))


if __name__ == "__main__":
    main()
