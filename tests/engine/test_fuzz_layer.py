"""A short run of the fuzzer on texts, and faults that it finds. A long run: `python -m tests.engine.fuzz.layer`."""

from collections import Counter

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("the fuzzer drives vLLM's CPU engine", allow_module_level=True)

from spla_backend.engine.state import RecurrentStateManager

from .fuzz.alone import TOLERANCE
from .fuzz.combinations import Combination
from .fuzz.driver import run, shrink
from .fuzz.layer import ReadingRun
from .fuzz.planted import first_failure, stamps_without_content, statistics_made_once

pytestmark = pytest.mark.engine

# In float32 alone: code for another dtype takes half a minute to compile.
SEEDS = [seed for seed in range(40) if Combination.draw(seed).dtype == "float32"]

EVENTS = """
    aborts arrivals chunks decode_rows drafts heirs outputs_beyond_the_budget outputs_compared poisoned_blocks
    preemptions prefill_rows prefix_hits rejected_drafts resets resets_of_running_requests resumptions
    resumptions_with_prefix_hits verification_rows
"""


def test_every_output_is_the_texts():
    counts: Counter[str] = Counter()
    for seed in SEEDS[:10]:
        _, failure = run(seed, 40, counts, kind=ReadingRun)
        assert failure is None, f"\n{failure}"
    assert counts["worlds"] == 10
    assert [event for event in EVENTS.split() if not counts[event]] == []


def test_combinations_differ():
    """Worlds of many seeds have every value of every option."""
    drawn = [name for seed in range(400) for name in Combination.draw(seed).groups()]
    assert min(Counter(drawn).values()) >= 10
    assert len({str(Combination.draw(seed).drawn) for seed in range(400)}) > 350


def test_what_differs_by_rounding_is_no_failure(monkeypatch):
    """Where less rounding is allowed than there is, the reference must excuse outputs."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 1e-6)
    counts: Counter[str] = Counter()
    _, failure = run(SEEDS[1], 20, counts, kind=ReadingRun)
    assert failure is None, f"\n{failure}"
    assert 0 < counts["near_ties"] < counts["outputs_compared"] // 10


def test_stale_states_are_found(monkeypatch):
    """Stamps do not name the content: a request then takes another one's state for its own, whose pages had the same
    numbers. One world in a hundred has such a request; this one was found by trying."""
    stamps_without_content(monkeypatch)
    assert "from the reference" in first_failure(ReadingRun, 210, (109,)).message


def test_stale_statistics_are_found_and_made_small(monkeypatch):
    """Those of a page are not made again where there are some, of another request or of a rejected draft."""
    statistics_made_once(monkeypatch)
    failure = first_failure(ReadingRun, 60, SEEDS)
    assert "from the reference" in failure.message
    smaller = shrink(failure)
    assert smaller.only is not None and "python -m tests.engine.fuzz.layer --seed" in str(smaller)
    _, again = run(smaller.seed, smaller.steps, Counter(), smaller.only, ReadingRun)
    assert again == smaller


def test_a_leak_is_found_in_the_step_that_leaks(monkeypatch):
    """State blocks of one request are not given back."""
    original = RecurrentStateManager.pop_blocks_for_free
    leaked: list[int] = []

    def leaky(self: RecurrentStateManager, request_id: str) -> list:
        blocks = original(self, request_id)
        if leaked or not blocks:
            return blocks
        leaked.extend(block.block_id for block in blocks)
        return []

    monkeypatch.setattr(RecurrentStateManager, "pop_blocks_for_free", leaky)
    # A reset would come upon the leak first, and vLLM end it.
    failure = first_failure(ReadingRun, 60, (seed for seed in SEEDS if not Combination.draw(seed).resets))
    assert f"leak: {sorted(leaked)} are not held as often as tables name them" in failure.message
