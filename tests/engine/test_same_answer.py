"""The same answer whatever the engine does: chunking, prefix caching, preemption, batching, reused memory."""

import random
from dataclasses import dataclass

import pytest

from .conftest import BUDGET, PAGE, Answer, assert_same, random_prompt, start_engine

pytestmark = pytest.mark.engine

# Around page and budget edges, and well beyond them.
LENGTHS = (5, PAGE - 1, PAGE, PAGE + 1, BUDGET - 1, BUDGET, BUDGET + 1, 333, 640, 700)
PROMPTS = [random_prompt(n, seed=n) for n in LENGTHS]


SHARED = (PAGE, 3 * PAGE + 5, 500)  # lengths of prefixes that prompts share


def prompts_with_prefix(shared: int) -> list[list[int]]:
    prefix = random_prompt(shared, seed=1000 + shared)
    return [prefix + random_prompt(n, seed=shared + n) for n in (1, PAGE - 3, 200)]


@dataclass
class Plain:
    """What one engine without any trick answers: starting engines is what takes time here."""

    alone: list[Answer]  # every prompt by itself, whole
    order: list[int]
    batch: list[Answer]  # sixteen at once, in `order`
    prefixed: dict[int, list[Answer]]  # by length of the prefix, one by one
    folded: list[int]  # pages added to a state at a time: a long prompt, then a long answer to it
    pages_read: list[float]  # by each worker in the last of these steps


@pytest.fixture(scope="module")
def plain(tiny_llama):
    order = [*range(len(PROMPTS)), 9, 8, 7, 3, 2, 0]
    random.Random(0).shuffle(order)
    extension = "spla_backend.engine.reads.ReadCounts"
    with start_engine(tiny_llama, worker_extension_cls=extension) as engine:
        alone = [engine.answer([p])[0] for p in PROMPTS]
        batch = engine.answer([PROMPTS[i] for i in order])
        prefixed = {
            shared: [engine.answer([p], logprobs=False)[0] for p in prompts_with_prefix(shared)] for shared in SHARED
        }
        folded = folded_pages(engine)
        pages_read = engine.llm.collective_rpc("spla_pages_read")
    return Plain(alone, order, batch, prefixed, folded, pages_read)


def folded_pages(engine):
    from spla_backend.kernels.cpu.vectorised import VectorisedAttention

    folded = []
    original = VectorisedAttention.add_pages

    def counted(self, s, z, kv_cache, pages):
        folded.append(pages.numel())
        return original(self, s, z, kv_cache, pages)

    engine.answer([PROMPTS[8]], max_tokens=1)
    VectorisedAttention.add_pages = counted
    try:
        engine.answer([PROMPTS[8]], max_tokens=3 * PAGE, logprobs=False)
    finally:
        VectorisedAttention.add_pages = original
    return folded


@pytest.fixture(scope="module")
def alone(plain):
    return plain.alone


@pytest.fixture(scope="module")
def dense(tiny_llama):
    with start_engine(tiny_llama, backend=None) as engine:
        return engine.answer(PROMPTS)


def test_sparse_differs_from_dense(alone, dense):
    """Or nothing else in this file would show anything."""
    for length, a, d in zip(LENGTHS, alone, dense, strict=True):
        differs = max((abs(x - y) for x, y in zip(a.logprobs, d.logprobs, strict=True)), default=0.0) > 1e-3
        assert differs == (length > BUDGET + PAGE), f"length {length}"


def test_whole_budget_is_dense(tiny_llama, start, dense):
    with start(tiny_llama, options={"budget": 1024}) as engine:
        assert_same(engine.answer(PROMPTS), dense)


def test_statistics_in_fp8(tiny_llama, start, alone, dense):
    """Pages are smaller, and nothing else may change: not by cached prefixes, chunks or what memory held before."""
    in_fp8 = {"statistics_dtype": "fp8"}
    prompts = [*PROMPTS[-2:], *prompts_with_prefix(SHARED[-1])]
    with start(tiny_llama, options=in_fp8, enable_prefix_caching=True) as engine:
        assert engine.runner.kv_caches[0].shape[2] == PAGE + 1  # 128 bytes of statistics and a stamp, of rows of 512
        whole = engine.answer(PROMPTS[-2:])  # nothing is cached where prompt logprobs are asked for
        plain = []
        for prompt in prompts:
            assert engine.llm.reset_prefix_cache()
            plain += engine.answer([prompt], logprobs=False)
        assert [a.cached_tokens for a in plain] == [0] * len(prompts)
        cached = [engine.answer([prompt], logprobs=False)[0] for prompt in prompts]
        assert all(a.cached_tokens >= SHARED[-1] // PAGE * PAGE for a in cached[3:])
        assert_same(cached, plain)
    with start(tiny_llama, options=in_fp8, max_num_batched_tokens=200) as engine:
        poison_free_blocks(engine)
        assert_same(engine.answer(PROMPTS[-2:]), whole)
    differences = [abs(x - y) for x, y in zip(whole[-1].logprobs, alone[-1].logprobs, strict=True)]
    assert max(differences) > 0
    with start(tiny_llama, options={**in_fp8, "budget": 1024}) as engine:
        assert_same(engine.answer(PROMPTS[-2:]), dense[-2:])


@pytest.mark.parametrize("chunk", [64, 100, 512])
def test_chunked_prefill(tiny_llama, start, alone, chunk):
    with start(tiny_llama, max_num_batched_tokens=chunk) as engine:
        assert_same(engine.answer(PROMPTS), alone)


def test_batch_in_any_order(plain):
    assert len(plain.batch) == 16
    assert_same(plain.batch, [plain.alone[i] for i in plain.order])


def test_prefix_caching(tiny_llama, start, plain):
    with start(tiny_llama, enable_prefix_caching=True) as engine:
        for shared in SHARED:
            prompts = prompts_with_prefix(shared)
            # One after the other, then all at once; asking for prompt logprobs would switch the cache's use off.
            first = [engine.answer([p], logprobs=False)[0] for p in prompts]
            again = engine.answer(prompts, logprobs=False)
            assert_same(first, plain.prefixed[shared])
            assert_same(again, plain.prefixed[shared])
            assert first[1].cached_tokens == shared // PAGE * PAGE
            assert all(a.cached_tokens >= shared // PAGE * PAGE for a in again)


def test_preemption(tiny_llama, start, alone):
    long = [7, 8, 9]
    with start(tiny_llama, num_gpu_blocks_override=60) as engine:
        preempted = engine.preemptions()
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
    from spla_backend.kernels.cpu.vectorised import VectorisedAttention

    with start(tiny_llama, num_gpu_blocks_override=40) as engine:
        # The pool is small, so that blocks come round again; with the rule in force nothing changes ...
        assert_same([engine.answer([PROMPTS[i]])[0] for i in (9, 8, 7, 9)], [alone[i] for i in (9, 8, 7, 9)])

        monkeypatch.setattr(VectorisedAttention, "covered_pages", _trusting_covered)
        # ... and without it the second request reads the first one's state.
        answers = [engine.answer([PROMPTS[i]])[0] for i in (9, 8, 7, 9)]
    with pytest.raises(AssertionError, match="differ"):
        assert_same(answers, [alone[i] for i in (9, 8, 7, 9)], tolerance=1e-3)


def _trusting_covered(self, rows_view, blocks, target, kv_cache, pages):
    import torch

    header = rows_view[blocks, :, 0, :8].contiguous().view(torch.int32)
    return max(0, min(int(header[0, 0, 1]), target))


def test_state_is_kept(plain):
    """Steady decode folds at most one page a step: the state is trusted, not rebuilt."""
    pages, layers = len(PROMPTS[8]) // PAGE, 3
    # Prefill adds the pages beyond the budget once, decode the pages before it once and then each new one once.
    assert sum(plain.folded) <= layers * (2 * pages + 4), sum(plain.folded)
    assert plain.folded.count(1) >= 3 * layers


def test_reads_are_counted(plain):
    assert plain.pages_read == [BUDGET / PAGE]
