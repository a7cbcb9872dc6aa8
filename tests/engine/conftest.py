"""Real vLLM engines in this process, on a small random Llama: seconds to start, and its memory can be touched."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before vLLM is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest

pytest.importorskip("vllm")

# `ONE_LEVEL`: the options of a test are added to these, and two levels have tests of their own.
from .fuzz.settings import ONE_LEVEL

VOCABULARY = 1000
PAGE = 32
BUDGET = 192  # 6 pages of 32: sparse from 193 tokens on

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_random_model(folder: Path, config: dict[str, Any], std: float = 0.08) -> str:
    """A model folder with random weights, large enough in scale that attention is not uniform."""
    import json

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0.0, std)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random_model(tmp_path_factory.mktemp("models") / "tiny-llama", LLAMA)


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[float]  # of the prompt's tokens but the first
    cached_tokens: int
    margins: list[float]  # by how much each new token was more likely than the next best, in nats


def margin(logprobs: list[float]) -> float:
    best, second = sorted(logprobs, reverse=True)[:2]
    return best - second


class Engine:
    """An `LLM` with shortcuts to what the tests look at."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def runner(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner

    def preemptions(self) -> list[str]:
        """Requests that are preempted from now on, in a list that grows."""
        preempted: list[str] = []
        original = self.scheduler._preempt_request
        self.scheduler._preempt_request = lambda request, *a, **k: (
            preempted.append(request.request_id),
            original(request, *a, **k),
        )[1]
        return preempted

    def answer(self, prompts: list[list[int]], max_tokens: int = 20, logprobs: bool = True) -> list[Answer]:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=0 if logprobs else None,
            logprobs=2,
        )
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return [
            Answer(
                list(o.outputs[0].token_ids),
                [x.logprob for entry in (o.prompt_logprobs or [])[1:] for x in list(entry.values())[:1]],
                o.num_cached_tokens or 0,
                [margin([x.logprob for x in entry.values()]) for entry in o.outputs[0].logprobs],
            )
            for o in outputs
        ]


@pytest.fixture
def start() -> Callable[..., contextlib.AbstractContextManager[Engine]]:
    """Start an engine for the length of a `with` statement; see `start_engine`."""
    return start_engine


running = 0
"""Engines in this process."""
_freeze, _unfreeze = gc.freeze, gc.unfreeze
# vLLM freezes the heap of an engine that runs, and thaws all there is at its end.
gc.freeze = gc.unfreeze = lambda: None  # type: ignore[assignment]


def pytest_unconfigure() -> None:
    _unfreeze()  # or extension modules report what they find at the interpreter's end


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """What imports and tests made before an engine is no garbage: of each, vLLM collects garbage six times, which would
    take .4 s of looking at these millions of objects."""
    global running
    if not running:
        _freeze()
    running += 1
    try:
        yield
    finally:
        running -= 1


@contextlib.contextmanager
def start_engine(
    model: str, backend: str | None = "spla", options: dict[str, Any] | None = None, **engine_args: Any
) -> Iterator[Engine]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 1024,
        "enforce_eager": True,
        "max_num_batched_tokens": 1024,
        "max_num_seqs": 16,
        "block_size": PAGE,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 28,  # which tests fill, too
        **engine_args,
    }
    if backend:
        arguments["attention_backend"] = backend
    if backend == "spla":
        arguments.setdefault("additional_config", {"spla": {"budget": BUDGET, **ONE_LEVEL, **(options or {})}})
    engine = None
    with counted(), pytest.MonkeyPatch.context() as environment:
        environment.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # it takes precedence over the argument
        try:
            engine = Engine(LLM(model, **arguments))
            yield engine
        finally:
            # Whoever still holds the `Engine` must not keep the engine alive: its late end would take the next one's
            # process groups with it.
            if engine is not None:
                vars(engine).clear()
            gc.collect()
            cleanup_dist_env_and_memory()


def random_prompt(length: int, seed: int) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def assert_same(actual: list[Answer], expected: list[Answer], tolerance: float = 1e-4) -> None:
    """Logprobs equal to rounding, greedy tokens equal."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a.logprobs and e.logprobs:
            worst = max(abs(x - y) for x, y in zip(a.logprobs, e.logprobs, strict=True))
            assert worst < tolerance, f"prompt {i}: prompt logprobs differ by {worst}"
        assert a.tokens == e.tokens, f"prompt {i}: greedy tokens differ"


@pytest.fixture
def spla_log() -> Iterator[list[str]]:
    """The messages that SPLA logs. By a filter, which stays when vLLM configures its loggers anew; handlers do not."""
    from spla_backend.engine.logger import logger

    messages: list[str] = []

    def keep(record: Any) -> bool:
        messages.append(record.getMessage())
        return True

    logger.addFilter(keep)
    yield messages
    logger.removeFilter(keep)
