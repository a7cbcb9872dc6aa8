"""The same answer whatever the engine does: chunking, prefix caching, preemption, batching, reused memory."""

import random

import pytest

from .conftest import BUDGET, PAGE, assert_same, random_prompt

pytestmark = pytest.mark.engine

# Around page and budget edges, and well beyond them.
LENGTHS = (5, PAGE - 1, PAGE, PAGE + 1, BUDGET - 1, BUDGET, BUDGET + 1, 333, 640, 700)
PROMPTS = [random_prompt(n, seed=n) for n in LENGTHS]


@pytest.fixture(scope="module")
def alone(tiny_llama):
    """Every prompt by itself, whole, without prefix caching."""
    from .conftest import start_engine

    with start_engine(tiny_llama) as engine:
        return [engine.answer([p])[0] for p in PROMPTS]


def test_sparse_differs_from_dense(tiny_llama, start, alone):
    """Or nothing else in this file would show anything."""
    with start(tiny_llama, backend=None) as engine:
        dense = engine.answer(PROMPTS)
    for length, a, d in zip(LENGTHS, alone, dense, strict=True):
        differs = max((abs(x - y) for x, y in zip(a.logprobs, d.logprobs, strict=True)), default=0.0) > 1e-3
        assert differs == (length > BUDGET + PAGE), f"length {length}"


def test_whole_budget_is_dense(tiny_llama, start):
    with start(tiny_llama, backend=None) as engine:
        dense = engine.answer(PROMPTS)
    with start(tiny_llama, options={"budget": 1024}) as engine:
        assert_same(engine.answer(PROMPTS), dense)


@pytest.mark.parametrize("chunk", [64, 100, 512])
def test_chunked_prefill(tiny_llama, start, alone, chunk):
    with start(tiny_llama, max_num_batched_tokens=chunk) as engine:
        assert_same(engine.answer(PROMPTS), alone)


def test_batch_in_any_order(tiny_llama, start, alone):
    order = [*range(len(PROMPTS)), 9, 8, 7, 3, 2, 0]  # sixteen
    random.Random(0).shuffle(order)
    with start(tiny_llama) as engine:
        assert_same(engine.answer([PROMPTS[i] for i in order]), [alone[i] for i in order])


@pytest.mark.parametrize("shared", [PAGE, 3 * PAGE + 5, 500])
def test_prefix_caching(tiny_llama, start, shared):
    prefix = random_prompt(shared, seed=1)
    prompts = [prefix + random_prompt(n, seed=100 + n) for n in (1, PAGE - 3, 200)]
    with start(tiny_llama) as engine:
        expected = [engine.answer([p], logprobs=False)[0] for p in prompts]
    with start(tiny_llama, enable_prefix_caching=True) as engine:
        # One after the other, then all at once; asking for prompt logprobs would switch the cache's use off.
        first = [engine.answer([p], logprobs=False)[0] for p in prompts]
        again = engine.answer(prompts, logprobs=False)
    assert_same(first, expected)
    assert_same(again, expected)
    assert first[1].cached_tokens == shared // PAGE * PAGE
    assert all(a.cached_tokens >= shared // PAGE * PAGE for a in again)


def test_preemption(tiny_llama, start, alone):
    long = [7, 8, 9]
    with start(tiny_llama, num_gpu_blocks_override=60) as engine:
        preempted = []
        original = engine.scheduler._preempt_request
        engine.scheduler._preempt_request = lambda request, *a, **k: (
            preempted.append(request.request_id),
            original(request, *a, **k),
        )[1]
        answers = engine.answer([PROMPTS[i] for i in long], max_tokens=60, logprobs=False)
        assert preempted, "the cache was large enough for everything: the test shows nothing"
    assert [a.tokens[:20] for a in answers] == [alone[i].tokens for i in long]


def poison_free_blocks(engine):
    """Fill every block that no request holds with NaN before every step: pages and states alike."""
    pool = engine.scheduler.kv_cache_manager.block_pool
    schedule = engine.scheduler.schedule
    poisoned = []

    def poisoned_schedule(*args, **kwargs):
        free = [b.block_id for b in pool.free_block_queue.get_all_free_blocks()]
        for cache in engine.runner.kv_caches:
            cache[free] = float("nan")
        poisoned.append(len(free))
        return schedule(*args, **kwargs)

    engine.scheduler.schedule = poisoned_schedule
    return poisoned


def test_poisoned_memory(tiny_llama, start, alone):
    """Old bytes never count: free pages and state blocks hold NaN whenever a request gets them."""
    with start(tiny_llama, max_num_batched_tokens=200) as engine:
        poisoned = poison_free_blocks(engine)
        assert_same(engine.answer(PROMPTS), alone)
        assert poisoned and min(poisoned) > 0


def test_stale_state_would_be_caught(tiny_llama, start, alone, monkeypatch):
    """A state that is believed whatever its stamp says gives another answer in a reused block."""
    from spla_backend.kernels.torch_paged import TorchPagedSpla

    with start(tiny_llama, num_gpu_blocks_override=40) as engine:
        # The pool is small, so that blocks come round again; with the rule in force nothing changes ...
        assert_same([engine.answer([PROMPTS[i]])[0] for i in (9, 8, 7, 9)], [alone[i] for i in (9, 8, 7, 9)])

        monkeypatch.setattr(TorchPagedSpla, "_covered", _trusting_covered)
        # ... and without it the second request reads the first one's state.
        answers = [engine.answer([PROMPTS[i]])[0] for i in (9, 8, 7, 9)]
    with pytest.raises(AssertionError, match="differ"):
        assert_same(answers, [alone[i] for i in (9, 8, 7, 9)], tolerance=1e-3)


def _trusting_covered(self, rows_view, blocks, target, kv_cache, pages):
    import torch

    header = rows_view[blocks, :, 0, :8].contiguous().view(torch.int32)
    return max(0, min(int(header[0, 0, 1]), target))


def test_state_is_kept(tiny_llama, start):
    """Steady decode folds at most one page a step: the state is trusted, not rebuilt."""
    from spla_backend.kernels.torch_paged import TorchPagedSpla

    folded = []
    original = TorchPagedSpla._add_pages

    def counted(self, s, z, kv_cache, pages):
        folded.append(pages.numel())
        return original(self, s, z, kv_cache, pages)

    with start(tiny_llama) as engine:
        engine.answer([PROMPTS[8]], max_tokens=1)
        TorchPagedSpla._add_pages = counted
        try:
            engine.answer([PROMPTS[8]], max_tokens=3 * PAGE, logprobs=False)
        finally:
            TorchPagedSpla._add_pages = original
    pages, layers = len(PROMPTS[8]) // PAGE, 3
    # Prefill adds the pages beyond the budget once, decode the pages before it once and then each new one once.
    assert sum(folded) <= layers * (2 * pages + 4), sum(folded)
    assert folded.count(1) >= 3 * layers
