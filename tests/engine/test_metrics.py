"""Counters of what finished requests read: equal to a count token by token, to the kernels' own, and in /metrics."""

from types import SimpleNamespace

import pytest

from .conftest import LLAMA, ONE_LEVEL, random_prompt, save_random_model

pytest.importorskip("vllm")

from spla_backend.engine.counts import Counts, RequestCounter
from spla_backend.options import SplaOptions

PAGE = 32


def make_counter(options: dict, dense_below: int, num_layers: int = 3) -> RequestCounter:
    resolved = SplaOptions.from_sources(options)
    layers = resolved.layers(PAGE, range(num_layers))
    return RequestCounter(resolved.parameters(PAGE), [layers.get(i) for i in range(num_layers)], dense_below)


@pytest.mark.parametrize(
    ("options", "dense_below"),
    [
        ({"budget": 192, **ONE_LEVEL}, 0),
        ({"budget": 192, **ONE_LEVEL}, 300),
        ({"budget": 200, "selection_block_size": 16, **ONE_LEVEL}, 100),
        ({"budget": 192, "layer_budgets": {"1": 96}, "dense_layers": [2], **ONE_LEVEL}, 0),
        ({"budget": 192}, 0),
    ],
)
@pytest.mark.parametrize(
    ("prompt", "cached", "generated"), [(5, 0, 1), (5, 0, 400), (191, 64, 3), (600, 0, 70), (600, 576, 2), (600, 64, 1)]
)
def test_token_by_token(options, dense_below, prompt, cached, generated):
    resolved = SplaOptions.from_sources(options)
    block, fine = resolved.block_size(PAGE), resolved.parameters(PAGE).fine_block
    whole = 2 if fine else 1  # budgets
    expected = Counts()
    for position in range(cached, prompt):
        if position < dense_below or position // block < whole * resolved.budget // block:
            expected.dense_prompt_tokens += 1
        else:
            expected.sparse_prompt_tokens += 1
    for position in range(prompt, prompt + generated - 1):
        expected.decode_tokens += 1
        held = position // block + 1
        expected.pages_held += held * block / PAGE
        for layer in range(3):
            budget, size = resolved.layer_budgets.get(layer, resolved.budget) // block * block, fine or block
            read = position // size * size + size
            if layer not in resolved.dense_layers and position // block >= whole * budget // block:
                read = budget
            expected.pages_read += read / PAGE / 3
    assert vars(make_counter(options, dense_below).count(prompt, cached, generated)) == pytest.approx(vars(expected))


def test_nothing_was_computed():
    assert make_counter({"budget": 192}, 0).count(600, 0, 0) == Counts()


@pytest.mark.engine
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selection_block_size": 16},
        {"layer_budgets": {"1": 96}},
        {"fine_block_size": 16, "statistics_dtype": "fp8"},
    ],
    ids=str,
)
def test_as_the_kernels_count(tiny_llama, start, options):
    """The last step of a request computes the token before its last, and the CPU's kernels count what it reads."""
    options = {"budget": 192, **ONE_LEVEL, **options}
    counter = make_counter(options, 0)
    with start(tiny_llama, options=options, worker_extension_cls="spla_backend.engine.reads.ReadCounts") as engine:
        for length in (40, 191, 192, 600):
            engine.answer([random_prompt(length, seed=length)], max_tokens=2, logprobs=False)
            read = counter.count(length, 0, 2).pages_read
            assert engine.llm.collective_rpc("spla_pages_read") == [pytest.approx(read)]


def make_config(model: str, **arguments):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model, block_size=PAGE, **arguments).create_engine_config()


@pytest.fixture
def samples():
    """The value of a counter, None where there is no such counter."""
    from prometheus_client import REGISTRY
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    unregister_vllm_metrics()
    yield lambda name, model: REGISTRY.get_sample_value(f"vllm:spla_{name}_total", {"model_name": model, "engine": "0"})
    unregister_vllm_metrics()


def finished(**numbers):
    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

    stats = IterationStats()
    stats.finished_requests.append(FinishedRequestStats(finish_reason=FinishReason.LENGTH, **numbers))
    return stats


def test_logger(tiny_llama, samples, spla_log):
    """By vLLM's own manager, whose logger for Prometheus removes what others registered before it."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    from spla_backend.engine.metrics import SplaStatLogger

    config = make_config(tiny_llama, attention_backend="spla", additional_config={"spla": {"budget": 192}})
    manager = StatLoggerManager(config, [0], custom_stat_loggers=[SplaStatLogger], enable_default_loggers=False)
    manager.log_engine_initialized()
    assert samples("decode_tokens", tiny_llama) == 0
    requests = {"num_prompt_tokens": 600, "num_cached_tokens": 64, "num_generation_tokens": 33}
    manager.record(None, finished(**requests), engine_idx=0)
    manager.record(None, finished(**requests), engine_idx=0)
    manager.record(None, None, engine_idx=0)
    one = make_counter({"budget": 192}, 0).count(600, 64, 33)
    for name, value in vars(one).items():
        assert samples(name, tiny_llama) == pytest.approx(2 * value), name
    manager.log()
    manager.log()  # nothing has finished since
    assert [line for line in spla_log if "finished requests" in line] == [
        "SPLA: finished requests generated 64 tokens that read 384 of 1264 pages (30.4%); prompt tokens: 256 dense, "
        "816 sparse"
    ]


@pytest.mark.parametrize("chosen", [False, True], ids=["another-backend", "no-layer"])
def test_logger_without_spla(tmp_path, tiny_llama, samples, chosen):
    from spla_backend.engine.metrics import SplaStatLogger

    windows = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window": 128}
    windows |= {"layer_types": ["sliding_attention"] * 3, "query_pre_attn_scalar": 64}
    model = save_random_model(tmp_path / "windows", LLAMA | windows) if chosen else tiny_llama
    logger = SplaStatLogger(make_config(model, **({"attention_backend": "spla"} if chosen else {})), [0])
    logger.log_engine_initialized()
    logger.record(None, finished(num_prompt_tokens=600, num_generation_tokens=33))
    logger.log()
    assert logger.counter is None
    assert samples("decode_tokens", model) is None


def test_vllm_that_does_not_say(tiny_llama, monkeypatch, spla_log):
    """A server must not end with the first request because its counts have another name."""
    from vllm.v1.metrics.stats import FinishedRequestStats

    from spla_backend.engine.metrics import make_counter

    monkeypatch.delattr(FinishedRequestStats, "num_cached_tokens")
    monkeypatch.delitem(FinishedRequestStats.__annotations__, "num_cached_tokens")
    assert make_counter(make_config(tiny_llama, attention_backend="spla")) is None
    assert any("metrics are off: they use vLLM's FinishedRequestStats.num_cached_tokens" in line for line in spla_log)


def test_draft_only():
    """A draft with SPLA beside a model without: requests are the model's."""
    from spla_backend.engine.checks import is_chosen, is_chosen_for_model
    from spla_backend.engine.registration import backend_member

    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=None, backend_per_kind=None),
        speculative_config=SimpleNamespace(attention_backend=backend_member()),
    )
    assert is_chosen(config)
    assert not is_chosen_for_model(config)
