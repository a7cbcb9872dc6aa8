"""Quality of the models of `examples/continue_training.py`, served through vLLM: perplexity and retrieval tasks.

    python benchmarks/training.py --trained trained --text text.npz --output benchmarks/results/quality_training.json

Every model is served with the attention it was trained for; those trained with dense attention, with sparse attention
alone and with the default residual, and the start, also with those they were not. Prompts select as in decode. One
engine a process; with `--parallel` several of them share a GPU, which changes no result, and `--devices` spreads them
over GPUs. What has finished is not served again by a second call, so that models can be served while others are still
trained (`--models`). Rows are `{trained, attention, budget, kind, ...}`: `perplexity` rows as those of `spla-eval
perplexity`, paired to the model trained with dense attention; `task` rows with score, standard error and the paired
difference. Both are also paired with sparse attention alone at the same budget (`sparse_difference`): of the same model
where it was trained with dense attention or is the start, else of the model trained so.
"""

import argparse
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BUCKETS = (512, 1024, 2048, 4096, 8191)
PAGE_SIZE = 64
ATTENTION: dict[str, dict[str, Any] | None] = {
    "dense": None,
    # Without what was learned for a residual, if the model has it.
    "sparse": {"residual": "none", "prefill_dense_below": 0, "parameters_file": "none"},
    "regression": {"residual": "regression", "prefill_dense_below": 0},
    "trained": {},  # what the folder's own configuration says
}
OTHER = {"sparse": "regression", "regression": "sparse"}
"""What models trained with SPLA are served with as well: tells what the weights do from what the residual does."""


def jobs_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Which model to serve with which attention and budget."""
    untrained = [("dense", None), *((name, b) for name in ("sparse", "regression") for b in args.budgets)]
    jobs = [{"trained": "start", "folder": args.model, "attention": a, "budget": b} for a, b in untrained]
    for folder in finished(args.trained):
        names = [name for name in ("trained", OTHER.get(folder.name)) if name]
        own = untrained if folder.name == "dense" else [(name, budget) for name in names for budget in args.budgets]
        jobs += [{"trained": folder.name, "folder": str(folder), "attention": a, "budget": b} for a, b in own]
    for job in jobs:
        job["name"] = "-".join(str(job[key]) for key in ("trained", "attention", "budget"))
    # What everything is compared with goes first, in case time runs out.
    return sorted(jobs, key=lambda job: (job["budget"] or 0, job["trained"] == "start"))


def finished(trained: Path) -> list[Path]:
    """Folders of trained models."""
    return sorted(path.parent for path in trained.glob("*/training.json"))


def run_job(job: dict[str, Any], inputs: dict[str, Any], engine_args: dict[str, Any]) -> dict[str, Any]:
    """Losses of the documents and completions of the tasks of one model and attention."""
    from spla_backend.evaluate import engines
    from spla_backend.evaluate.variants import Variant

    options = ATTENTION[job["attention"]]
    if options is not None:
        options = {**options, "budget": job["budget"]}
    variant = Variant(f"{job['trained']}/{job['attention']}", options)
    with engines.start(job["folder"], variant, PAGE_SIZE, BUCKETS[-1] + 1, engine_args) as llm:
        losses = {
            kind: [[round(-x, 5) for x in losses] for losses in engines.prompt_logprobs(llm, documents, variant.name)]
            for kind, documents in inputs["documents"].items()
        }
        texts = engines.complete(llm, inputs["prompts"], inputs["max_tokens"], variant.name)
    return {"losses": losses, "texts": texts}


def make_inputs(args: argparse.Namespace) -> dict[str, Any]:
    """Documents and task samples, the same for all."""
    import numpy as np

    from spla_backend.evaluate.documents import load_tokenizer
    from spla_backend.evaluate.tasks import TASKS, make_sample

    text = np.load(args.text)
    tokenizer = load_tokenizer(args.model)

    def encode(prompt: str) -> list[int]:
        return tokenizer(prompt)["input_ids"]

    samples = [
        make_sample(task, args.length, i, lambda prompt: len(encode(prompt)))
        for task in TASKS
        for i in range(args.samples)
    ]
    return {
        # An engine generates a token behind each document.
        "documents": {
            kind: text[f"held_out_{kind}"][: args.documents, : BUCKETS[-1]].tolist() for kind in ("prose", "code")
        },
        "prompts": [encode(sample.prompt) for sample in samples],
        "max_tokens": [sample.max_tokens for sample in samples],
        "tasks": [sample.task for sample in samples],
        "answers": [sample.answers for sample in samples],
    }


def write_whole(path: Path, text: str) -> None:
    """So that nobody reads half of it."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text)
    partial.rename(path)


def rows_of(jobs: list[dict[str, Any]], inputs: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The report's rows of the jobs that have finished, in this call or before."""
    from spla_backend.evaluate.perplexity import compare
    from spla_backend.evaluate.task_report import mean_and_error
    from spla_backend.evaluate.tasks import score

    found = {}
    for i, job in enumerate(jobs):
        path = folder / f"{job['name']}.json"
        if path.exists():
            found[i] = json.loads(path.read_text())
    place = {(jobs[i]["trained"], jobs[i]["attention"], jobs[i]["budget"]): i for i in found}
    rows: list[dict[str, Any]] = []
    scores = {
        i: [score(text, answers) for text, answers in zip(done["texts"], inputs["answers"], strict=True)]
        for i, done in found.items()
    }
    for i, done in found.items():
        job = {key: jobs[i][key] for key in ("trained", "attention", "budget")}
        # The start is compared with itself, what was trained with the model trained with dense attention.
        against = place.get(("start" if job["trained"] == "start" else "dense", "dense", None), i)
        # Sparse attention alone, of the same model unless this one was trained with SPLA.
        served = (job["trained"], "sparse") if job["trained"] in ("start", "dense") else ("sparse", "trained")
        alone = place.get((*served, job["budget"]))
        for kind, losses in done["losses"].items():
            if not losses:
                continue
            for start, end in itertools.pairwise(BUCKETS):
                pair = compare(losses, found[against]["losses"][kind], start, end)
                if alone not in (None, i):
                    to_sparse = compare(losses, found[alone]["losses"][kind], start, end)
                    pair |= {f"sparse_{name}": to_sparse[name] for name in ("difference", "difference_se")}
                rows.append(job | {"kind": "perplexity", "text": kind} | pair)
        for task in [*dict.fromkeys(inputs["tasks"]), "mean"] if inputs["tasks"] else []:
            chosen = [k for k, name in enumerate(inputs["tasks"]) if task in (name, "mean")]
            mean, error = mean_and_error([scores[i][k] for k in chosen])
            difference, difference_error = mean_and_error([scores[i][k] - scores[against][k] for k in chosen])
            row = {"score": mean, "score_se": error, "difference": difference, "difference_se": difference_error}
            if alone not in (None, i):
                row["sparse_difference"], row["sparse_difference_se"] = mean_and_error(
                    [scores[i][k] - scores[alone][k] for k in chosen]
                )
            numbers = {name: None if x is None else round(x, 4) for name, x in row.items()}
            rows.append(job | {"kind": "task", "task": task} | numbers)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Last bucket of positions, and the mean of the tasks."""
    head = f"{'trained':>10} {'attention':>10} {'budget':>6}"
    lines = [
        f"{head} {'prose':>8} {'- dense':>15} {'- sparse':>15} {'code':>8} {'- dense':>15} {'- sparse':>15}  tasks"
    ]
    for key in dict.fromkeys((row["trained"], row["attention"], row["budget"]) for row in rows):
        mine = [row for row in rows if (row["trained"], row["attention"], row["budget"]) == key]
        line = f"{key[0]:>10} {key[1]:>10} {key[2] or '':>6}"
        for text in ("prose", "code"):
            for row in mine:
                if row.get("text") == text and row["end"] == BUCKETS[-1]:
                    line += f" {row['perplexity']:8.3f} {row['difference']:+8.4f}+-{row['difference_se'] or 0:.3f}"
                    to_sparse, error = row.get("sparse_difference"), row.get("sparse_difference_se")
                    line += f" {'':>15}" if to_sparse is None else f" {to_sparse:+8.4f}+-{error or 0:.3f}"
        tasks = " ".join(f"{row['task'][:6]} {row['score']:.2f}" for row in mine if row["kind"] == "task")
        lines.append(f"{line}  {tasks}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True, help="output folder of continue_training.py")
    parser.add_argument("--model", help="the folder that training started from; default: SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, required=True, help="from training_text.py")
    parser.add_argument("--output", type=Path, required=True, help="the report to write")
    parser.add_argument("--documents", type=int, default=12, help="held-out documents of each kind (%(default)s)")
    parser.add_argument("--samples", type=int, default=20, help="of each task (%(default)s)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a task (%(default)s)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 1024, 2048], help="to serve with (%(default)s)")
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON", help="further arguments of vllm.LLM"
    )
    parser.add_argument("--parallel", type=int, default=1, help="engines at a time (%(default)s)")
    parser.add_argument("--devices", nargs="+", help="GPUs to spread the engines over; default: the first one")
    parser.add_argument("--models", nargs="+", help="serve these alone: start, dense, ...; default: all there are")
    parser.add_argument("--seconds", type=float, default=3600, help="stop what has not finished by then (%(default)s)")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.model is None:
        from spla_backend.models import gguf

        args.model = str(gguf.packaged("smollm2"))
    jobs = jobs_of(args)
    scratch = args.output.with_suffix(".parts")
    if args.job is not None:
        inputs = json.loads((scratch / "inputs.json").read_text())
        arguments = {"max_num_batched_tokens": 2048, "enforce_eager": True} | args.engine_args
        result = run_job(next(job for job in jobs if job["name"] == args.job), inputs, arguments)
        write_whole(scratch / f"{args.job}.json", json.dumps(result))
        return

    from spla_backend.evaluate import report

    scratch.mkdir(parents=True, exist_ok=True)
    inputs = make_inputs(args)
    write_whole(scratch / "inputs.json", json.dumps(inputs))
    chosen = [job for job in jobs if args.models is None or job["trained"] in args.models]
    waiting = [job["name"] for job in chosen if not (scratch / f"{job['name']}.json").exists()]
    running: dict[str, tuple[subprocess.Popen[bytes], str | None]] = {}
    devices: list[str | None] = args.devices or [None]
    begin = time.monotonic()
    while (waiting or running) and time.monotonic() - begin < args.seconds:
        while waiting and len(running) < args.parallel:
            name = waiting.pop(0)
            used = [device for _, device in running.values()]
            device = min(devices, key=used.count)
            environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
            with (scratch / f"{name}.log").open("w") as log:
                command = [sys.executable, *sys.argv, "--job", name, "--model", args.model]
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
            running[name] = process, device
        for name in [name for name, (process, _) in running.items() if process.poll() is not None]:
            process, device = running.pop(name)
            print(f"{time.monotonic() - begin:5.0f} s {name} ended with {process.returncode}", file=sys.stderr)
        time.sleep(0.5)
    for process, _ in running.values():
        os.killpg(process.pid, signal.SIGKILL)  # the engine's own processes with it

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    training = [json.loads((folder / "training.json").read_text()) for folder in finished(args.trained)]
    rows = rows_of(jobs, inputs, scratch)
    result = {**report.header("training", settings), "training": training, "rows": rows}
    result["command"] = shlex.join(["python", *sys.argv])
    report.write(result, args.output)
    print(table(rows))


if __name__ == "__main__":
    main()
