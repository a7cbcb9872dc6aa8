"""Continue training a model with dense attention, with sparse attention alone, and with SPLA: same start, same data.

    python examples/training_text.py --output text.npz
    python examples/continue_training.py --text text.npz --output trained

Each variant ends as a model folder that `vllm serve trained/NAME --attention-backend spla` serves as it was trained
(`dense` without the backend, of course), and as rows of `trained/report.json`: perplexity on held-out documents, by
position, of every trained model with the attention it was trained for, and of the dense one with those that it was
not. Without `--model` the start is SmolLM2-135M-Instruct. Variants whose folders are finished are not trained again,
so that an interrupted run goes on with the next.

A GPU is advisable: SPLA in training computes the weights of all pairs of tokens (docs/training.md).
"""

import argparse
import itertools
import json
import math
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from spla_backend.evaluate import report
from spla_backend.evaluate.documents import load_tokenizer
from spla_backend.evaluate.perplexity import compare
from spla_backend.training import attach, fit_norms, save, set_budget

VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "sparse": {"residual": "none"},
    # SPLA with the defaults: the regression state under one normaliser, and a gain for each head.
    "regression": {"residual": "regression"},
    # The paper's linear attention beside the exact part, each with a norm of its own, weights for each head. So large
    # an epsilon leaves most of the exact part's length in place, and the model near the one it was (docs/training.md).
    "linear": {"residual": "linear", "combine": "double_rmsnorm", "rms_norm_eps": 1.0},
    "linear-small-eps": {"residual": "linear", "combine": "double_rmsnorm", "rms_norm_eps": 1e-6},
}
UNTRAINED = ("dense", "sparse", "regression")
"""What dense models are evaluated with; `double_rmsnorm` means nothing to them."""
BUCKETS = (512, 1024, 2048, 4096, 8192)
REPORT = "report.json"
DONE = "training.json"


def sequences(text: Any, length: int, seed: int) -> np.ndarray:
    """Training sequences of both kinds in random order `[n, length]`."""
    pieces = [text[kind][: len(text[kind]) // length * length].reshape(-1, length) for kind in ("code", "prose")]
    return np.random.default_rng(seed).permutation(np.concatenate(pieces))


def batches(data: np.ndarray, size: int, steps: int, device: str) -> list[torch.Tensor]:
    """Of `steps` steps, `[size, length]` int64 each; beginning again where the data ends."""
    indices = np.arange(steps * size).reshape(steps, size) % len(data)
    return [torch.from_numpy(data[rows].astype(np.int64)).to(device) for rows in indices]


def loss_of(model: Any, ids: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Loss of every token but the first, in bfloat16 where there is a GPU."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [batch, length - 1, vocabulary]
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction=reduction)


def train(model: Any, steps: list[torch.Tensor], args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train in place; returns what is worth knowing about it."""
    # The same draw for every variant.
    budgets = np.random.default_rng(args.seed).choice(args.budget, len(steps)).tolist() if VARIANTS[name] else []
    learned = [p for n, p in model.named_parameters() if ".spla." in n]
    others = [p for n, p in model.named_parameters() if ".spla." not in n]
    groups = [{"params": others, "lr": args.lr}, {"params": learned, "lr": args.lr_learned}]
    peaks = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(1, len(steps) // 20)
    losses: list[float] = []
    times: list[float] = []
    model.train()
    begin = time.monotonic()
    for step, batch in enumerate(bar := tqdm(steps, desc=name, unit="step")):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min((step + 1) / warmup, 1 - step / len(steps))
        if budgets:
            set_budget(model, budgets[step])
        total = 0.0
        for part in batch.split(args.micro_batch):
            loss = loss_of(model, part) * (len(part) / len(batch))
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(total, 4))
        times.append(time.monotonic() - begin)
        bar.set_postfix(loss=f"{total:.3f}")
        if time.monotonic() - begin > 60 * args.minutes:
            break
    model.eval()
    seconds = round(time.monotonic() - begin, 1)
    return {
        "variant": name,
        "steps": len(losses),
        "tokens": len(losses) * batch.numel(),
        "seconds": seconds,
        # The first step compiles.
        "seconds_a_step": round(statistics.median(np.diff(times)), 4) if len(times) > 1 else None,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if batch.is_cuda else None,
        "losses": losses,
        "budgets": budgets[: len(losses)],
    }


@torch.no_grad()
def held_out_losses(model: Any, documents: np.ndarray) -> list[list[float]]:
    """By document, of the tokens at positions 1, 2, ..."""
    device = str(model.device)
    return [
        loss_of(model, torch.from_numpy(document.astype(np.int64))[None].to(device), reduction="none").tolist()
        for document in documents
    ]


def load(folder: str | Path, device: str) -> Any:
    """A model with weights in float32; its configuration keeps the dtype that they are stored in."""
    stored = AutoConfig.from_pretrained(folder, local_files_only=True).dtype
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.config.dtype = stored
    return model.to(device).eval()


def evaluate(args: argparse.Namespace, text: Any, result: dict[str, Any]) -> None:
    """Fill `result["rows"]`: every model with the attention it was trained for, the dense ones also with the others."""
    held_out = {kind: text[f"held_out_{kind}"][: args.documents] for kind in ("prose", "code")}
    jobs = [("start", args.model, name) for name in UNTRAINED]
    jobs += [("dense", args.output / "dense", name) for name in UNTRAINED]
    jobs += [(name, args.output / name, name) for name in args.variants if name != "dense"]
    baseline: dict[str, list[list[float]]] = {}
    for trained, folder, attention in tqdm(jobs, desc="held-out text", unit="model"):
        if not Path(folder).is_dir():
            continue
        budgets = [None] if attention == "dense" else args.evaluate_budgets
        for budget in budgets:
            model = load(folder, args.device)
            options = VARIANTS[attention]
            if options is not None:
                attach(model, {**options, "budget": budget}, args.page_size)
            for kind, documents in held_out.items():
                losses = held_out_losses(model, documents)
                # Differences are to the model trained with dense attention; to the start while there is none.
                if (trained, attention) in (("start", "dense"), ("dense", "dense")):
                    baseline[kind] = losses
                edges = [edge for edge in BUCKETS if edge <= documents.shape[1]]
                for start, end in itertools.pairwise(edges):
                    row = {"trained": trained, "attention": attention, "budget": budget, "text": kind}
                    result["rows"].append(row | compare(losses, baseline[kind], start, end))
            report.write(result, args.output / REPORT)


def table(rows: list[dict[str, Any]]) -> str:
    """Short table of the last bucket of positions."""
    last = max(row["end"] for row in rows)
    lines = [f"{'trained':>10} {'attention':>10} {'budget':>7} {'text':>6} {'perplexity':>11} {'- dense':>9} {'+-':>7}"]
    for row in rows:
        if row["end"] == last:
            lines.append(
                f"{row['trained']:>10} {row['attention']:>10} {row['budget'] or '':>7} {row['text']:>6} "
                f"{row['perplexity']:11.3f} {row['difference']:+9.4f} {row['difference_se'] or math.nan:7.4f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the folder to start from; default: SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, required=True, help="from training_text.py")
    parser.add_argument("--output", type=Path, required=True, help="a folder for the trained models and the report")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS)[:4])
    parser.add_argument("--steps", type=int, default=200, help="of every variant (%(default)s)")
    parser.add_argument("--minutes", type=float, default=20, help="stop a variant after so long (%(default)s)")
    parser.add_argument("--length", type=int, default=8192, help="tokens a sequence (%(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="sequences a step (%(default)s)")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences at a time (%(default)s)")
    parser.add_argument(
        "--budget",
        nargs="+",
        type=int,
        default=[512, 1024, 2048],
        help="SPLA's in training, one drawn for each step: those to be served, the first by default (%(default)s)",
    )
    parser.add_argument("--evaluate-budgets", nargs="+", type=int, default=[512, 1024, 2048], help="%(default)s")
    parser.add_argument("--page-size", type=int, default=64, help="--block-size to serve with (%(default)s)")
    parser.add_argument(
        "--documents", type=int, default=12, help="held-out documents of each kind, 0 for none (%(default)s)"
    )
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate (%(default)s)")
    parser.add_argument("--lr-learned", type=float, default=5e-3, help="the same for gains and norms (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.model is None:
        from spla_backend.models import gguf

        args.model = str(gguf.packaged("smollm2"))
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # SPLA's logits: bfloat16 operands are exact in TF32
    args.output.mkdir(parents=True, exist_ok=True)
    text = np.load(args.text)
    steps = batches(sequences(text, args.length, args.seed), args.batch, args.steps, args.device)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    training: list[dict[str, Any]] = []
    header = report.header("training", settings | {"options": VARIANTS})
    command = shlex.join(["python", *sys.argv])
    result = {**header, "command": command, "rows": [], "training": training}

    for name in args.variants:
        folder = args.output / name
        if not (folder / DONE).exists():
            torch.manual_seed(args.seed)
            model = load(args.model, args.device)
            options = VARIANTS[name]
            if options is not None:
                attach(model, {**options, "budget": args.budget[0]}, args.page_size)
                if options.get("combine") == "double_rmsnorm":
                    fit_norms(model, [part for batch in steps[:2] for part in batch.split(args.micro_batch)])
            done = train(model, steps, args, name)
            for parameter_name, parameter in model.named_parameters():
                if ".spla." not in parameter_name:
                    parameter.data = parameter.data.to(model.config.dtype)
            save(model, folder)
            load_tokenizer(args.model).save_pretrained(folder)
            partial = folder / f"{DONE}.partial"  # whoever sees DONE sees a complete folder
            partial.write_text(json.dumps(done))
            partial.rename(folder / DONE)
            del model
        training.append(json.loads((folder / DONE).read_text()))
    report.write(result, args.output / REPORT)
    if args.documents:
        evaluate(args, text, result)
        print(table(result["rows"]))


if __name__ == "__main__":
    main()
