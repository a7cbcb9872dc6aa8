"""Real vLLM engines, one after the other: CPU or GPU, dense or SPLA."""

import contextlib
import functools
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from .variants import Variant


@contextlib.contextmanager
def start(
    model: str, variant: Variant, page_size: int, max_model_len: int, engine_args: Mapping[str, Any]
) -> Iterator[Any]:
    """A `vllm.LLM` for the length of a `with` statement; its memory is free afterwards.

    Args:
        model: A local model folder.
        variant: Attention and its options.
        page_size: vLLM's block size, the same for dense attention.
        max_model_len: The longest sequence.
        engine_args: Further arguments of `LLM`, which go before ours.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {
        "block_size": page_size,
        "max_model_len": max_model_len,
        "enable_prefix_caching": False,  # prompt logprobs are not to come from anywhere else
        "enforce_eager": current_platform.is_cpu(),  # compiling takes longer there than what it would save
        "seed": 0,
    }
    if variant.options is not None:
        arguments |= {"attention_backend": "spla", "additional_config": {"spla": dict(variant.options)}}
    llm = None
    try:
        llm = LLM(model, **(arguments | dict(engine_args)))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            vars(llm).clear()  # whoever still holds it does not hold the engine's memory
        gc.collect()
        cleanup_dist_env_and_memory()


def progress(description: str) -> Any:
    """For `use_tqdm` of vLLM: a bar that says which variant is running."""

    def bar(*args: Any, **kwargs: Any) -> Any:
        return tqdm(*args, **(kwargs | {"desc": description}))

    return functools.wraps(tqdm)(bar)


def prompt_logprobs(llm: Any, documents: Sequence[Sequence[int]], description: str) -> list[list[float]]:
    """Log-probability of every token but the first of each document, given those before it."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": list(tokens)} for tokens in documents]
    outputs = llm.generate(prompts, sampling, use_tqdm=progress(description))
    return [
        [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)]
        for output, tokens in zip(outputs, documents, strict=True)
    ]


def complete(llm: Any, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int], description: str) -> list[str]:
    """Greedy completions, all prompts in one batch.

    Args:
        llm: From `start`.
        prompts: Token ids.
        max_tokens: Of each prompt's completion.
        description: What the progress bar says.
    """
    from vllm import SamplingParams

    sampling = [SamplingParams(temperature=0, max_tokens=n) for n in max_tokens]
    inputs = [{"prompt_token_ids": list(tokens)} for tokens in prompts]
    outputs = llm.generate(inputs, sampling, use_tqdm=progress(description))
    return [output.outputs[0].text for output in outputs]
