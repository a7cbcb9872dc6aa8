"""Time to first token and time per output token through real vLLM, dense and SPLA side by side.

    python benchmarks/engine.py --model MODEL --contexts 2048 4096 8192 --output benchmarks/results/engine_cpu.json

Protocol: one engine after the other in this process, each request batch once to warm up with a short prompt, prompts
cut from real text (random tokens where the weights are random), prefix caching off, greedy, no early stop. Shapes are
repeated for some seconds, because whatever is compiled or allocated at its first use counts in the first time; numbers
are medians. Random weights are normal, so that pages weigh differently as in a model; with vLLM's dummy weights, which
are tiny, they weigh the same, and for that the selection takes several rounds. Times come from the engine's own request
statistics: the first token's latency (of a batch, the first of all), and the time between first and last token divided
by the tokens between them. Rows are `{backend, batch, context, tpot_ms, ttft_s, runs, ttft_first_s, ...}`. With
`--profile` each shape runs once more under the engine's profiler, and its row says where the GPU's time in a decode
step and in all prompt steps goes: microseconds by kernel and without any.
"""

import argparse
import gc
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from spla_backend.evaluate.report import hardware, versions

# Shape of Llama-3.1-8B, for `--model llama-8b-random`.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def token_source(model: str, vocab_size: int) -> list[int]:
    """Tokens of a long real text (the language reference that comes with Python), or random ones without a
    tokenizer."""
    if (Path(model) / "tokenizer.json").exists():
        from pydoc_data.topics import topics

        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model)("\n\n".join(topics.values()))["input_ids"]
    import numpy as np

    return np.random.default_rng(0).integers(10, vocab_size, 1 << 20).tolist()


def draw_weights(model: Any) -> None:
    """In a worker: random weights of the usual scale in place of vLLM's dummy ones."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02)


def measure(llm: Any, source: list[int], batch: int, context: int, tokens: int) -> dict[str, float]:
    from vllm import SamplingParams

    room = context - tokens
    offsets = [i * (len(source) - room) // max(batch, 1) for i in range(batch)]
    prompts = [{"prompt_token_ids": source[o : o + room]} for o in offsets]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, sampling, use_tqdm=True)
    stats = [o.metrics for o in outputs]
    # With a batch, decode is uniform only from the moment the last request has its first token.
    start = max(s.first_token_ts for s in stats)
    spans = [(s.last_token_ts - s.first_token_ts) / (tokens - 1) for s in stats]
    last = [s for s in stats if s.first_token_ts == start]
    return {
        "tpot_ms": 1e3 * statistics.median((s.last_token_ts - s.first_token_ts) / (tokens - 1) for s in last),
        "tpot_mean_ms": 1e3 * statistics.mean(spans),
        "ttft_s": min(s.first_token_latency for s in stats),
    }


def repeated(seconds: float, llm: Any, source: list[int], batch: int, context: int, tokens: int) -> dict[str, float]:
    """Medians of measurements for so many seconds; at least one, at most nine."""
    begin, found = time.monotonic(), []
    while not found or (time.monotonic() - begin < seconds and len(found) < 9):
        found.append(measure(llm, source, batch, context, tokens))
    medians = {name: statistics.median(x[name] for x in found) for name in found[0]}
    return medians | {"runs": len(found), "ttft_first_s": found[0]["ttft_s"]}


def profile(
    llm: Any, traces: Path, source: list[int], batch: int, context: int, tokens: int
) -> dict[str, dict[str, float]]:
    """Microseconds by kernel, longest first, and `idle` where none runs: of a decode step, and of all prompt steps."""
    llm.start_profile()
    tpot_us = 1e3 * measure(llm, source, batch, context, tokens)["tpot_ms"]
    llm.stop_profile()
    newest = max(traces.glob("*.json*"), key=lambda path: path.stat().st_mtime)
    with (gzip.open if newest.suffix == ".gz" else open)(newest, "rt") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    events.sort(key=lambda e: e["ts"])
    # Prompts come before; the last step ends where the profiler does.
    last = max(e["ts"] + e["dur"] for e in events) - tpot_us
    first = last - (tokens - 3) * tpot_us
    steps = (last - first) / tpot_us
    return {
        "step_us": _by_kernel(events, first, last, steps),
        "prompt_us": _by_kernel(events, events[0]["ts"], first - tpot_us, 1),
    }


def _by_kernel(events: list[dict[str, Any]], first: float, last: float, share: float) -> dict[str, float]:
    """Microseconds between two times over `share`; a kernel's is that in which no kernel before it runs: launches
    overlap."""
    total: dict[str, float] = defaultdict(float)
    busy_until = first
    for event in events:
        start, end = event["ts"], min(event["ts"] + event["dur"], last)
        if end <= busy_until:
            continue
        total["idle"] += max(0.0, start - busy_until)
        total[event["name"].split("(")[0].split("<")[0]] += end - max(start, busy_until)
        busy_until = end
    return {name: round(us / share, 1) for name, us in sorted(total.items(), key=lambda item: -item[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or name, or llama-8b-random")
    parser.add_argument("--backends", nargs="+", default=["dense", "spla"], choices=["dense", "spla"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--shapes", nargs="+", metavar="BATCHxCONTEXT", help="instead of all contexts with all batches")
    parser.add_argument("--tokens", type=int, default=33, help="output tokens a request")
    parser.add_argument("--seconds", type=float, default=5, help="repeat each shape for so long (%(default)s)")
    parser.add_argument("--options", type=json.loads, default={}, help="SPLA options, e.g. '{\"budget\": 1024}'")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="further arguments of vllm.LLM, as JSON")
    parser.add_argument("--profile", action="store_true", help="once more under the profiler: steps by kernel")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    shapes = [(batch, context) for context in args.contexts for batch in args.batches]
    if args.shapes:
        shapes = [(int(batch), int(context)) for batch, context in (shape.split("x") for shape in args.shapes)]
    model = args.model
    engine_args: dict[str, Any] = {"max_model_len": max(c for _, c in shapes), "enable_prefix_caching": False}
    if model == "llama-8b-random":
        folder = Path(os.environ.get("TMPDIR", "/tmp")) / "llama-8b-random"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(LLAMA_8B))
        model = str(folder)
        engine_args |= {"load_format": "dummy", "skip_tokenizer_init": True}
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for `draw_weights`, which goes to the workers
    traces = Path(tempfile.mkdtemp()) if args.profile else None
    if traces:
        profiler = {"profiler": "torch", "torch_profiler_dir": str(traces), "torch_profiler_with_stack": False}
        engine_args["profiler_config"] = profiler
    engine_args |= {"max_num_seqs": max(b for b, _ in shapes), **args.engine_args}

    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    rows: list[dict[str, Any]] = []
    about = {"command": "python " + " ".join(sys.argv), "versions": versions(), "hardware": hardware()}
    for backend in args.backends:
        chosen = {"attention_backend": "spla", "additional_config": {"spla": args.options}} if backend == "spla" else {}
        llm = LLM(model, disable_log_stats=False, **engine_args, **chosen)
        if args.model == "llama-8b-random":
            llm.apply_model(draw_weights)
        source = token_source(model, llm.model_config.get_vocab_size())
        llm.generate([{"prompt_token_ids": source[:300]}], SamplingParams(max_tokens=4, detokenize=False))
        for batch, context in shapes:
            row = {"backend": backend, "batch": batch, "context": context}
            row |= repeated(args.seconds, llm, source, batch, context, args.tokens)
            if traces:
                row |= profile(llm, traces, source, batch, context, args.tokens)
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.output:
                args.output.write_text(json.dumps(about | {"options": args.options, "rows": rows}, indent=1) + "\n")
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()

    print(f"{'backend':8} {'batch':>5} {'context':>8} {'ttft s':>9} {'tpot ms':>9}")
    for r in rows:
        print(f"{r['backend']:8} {r['batch']:5} {r['context']:8} {r['ttft_s']:9.3f} {r['tpot_ms']:9.2f}")


if __name__ == "__main__":
    main()
