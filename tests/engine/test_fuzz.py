"""A short run of the fuzzer, and faults that it finds. A long run: `python -m tests.engine.fuzz`."""

from collections import Counter

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("the fuzzer drives vLLM's CPU engine", allow_module_level=True)

from spla_backend.engine.state import RecurrentStateManager

from .fuzz.alone import TOLERANCE
from .fuzz.driver import Run, run, shrink
from .fuzz.planted import first_failure, stamps_without_content, statistics_made_once
from .fuzz.settings import OPTIONS, Settings

pytestmark = pytest.mark.engine

# Of one world of each set of options, in float32 alone: code for another dtype takes half a minute to compile.
SEEDS = [
    next(seed for seed in range(1000) if (s := Settings.draw(seed)).options == name and s.dtype == "float32")
    for name in OPTIONS
]

EVENTS = """
    aborts arrivals chunks decode_rows drafts heirs outputs_against_reference outputs_compared poisoned_blocks
    outputs_that_must_be_bit_equal preemptions prefill_rows prefix_hits rejected_drafts resets
    resets_of_running_requests resumptions resumptions_with_prefix_hits verification_rows
"""


def test_every_token_has_the_answer_that_it_has_alone():
    counts: Counter[str] = Counter()
    for seed in SEEDS:
        _, failure = run(seed, 40, counts)
        assert failure is None, f"\n{failure}"
    assert counts["worlds"] == len(OPTIONS)
    assert [event for event in EVENTS.split() if not counts[event]] == []


def test_what_differs_by_rounding_is_no_failure(monkeypatch):
    """Where no rounding is allowed, every output that is not bit for bit the same must be that of a query that differs
    by rounding; nothing else is let pass, as the tests below show."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 1e-12)
    counts: Counter[str] = Counter()
    _, failure = run(SEEDS[list(OPTIONS).index("top-p")], 3, counts)
    assert failure is None, f"\n{failure}"
    assert counts["near_ties"] > 0


def test_stamps_that_do_not_name_the_content_are_found(monkeypatch):
    """A request then takes another one's state for its own, whose pages had the same numbers. One world in a hundred
    has such a request within 60 steps; these were found by trying."""
    stamps_without_content(monkeypatch)
    assert "from what it is alone" in first_failure(Run, 60, (342, 180)).message


def test_statistics_of_a_rejected_draft_are_found(monkeypatch):
    """Those of a page that is completed twice, first by a draft, are made once."""
    statistics_made_once(monkeypatch)
    assert "from what it is alone" in first_failure(Run, 60, SEEDS).message


def test_a_leak_is_found_and_made_small(monkeypatch):
    """State blocks of every other request are not given back."""
    original = RecurrentStateManager.pop_blocks_for_free

    def leaky(self: RecurrentStateManager, request_id: str) -> list:
        blocks = original(self, request_id)
        return [] if int(request_id.split()[-1]) % 2 else blocks

    monkeypatch.setattr(RecurrentStateManager, "pop_blocks_for_free", leaky)
    failure = first_failure(Run, 10, SEEDS)
    assert "leak: " in failure.message
    smaller = shrink(failure)
    assert "leak: " in smaller.message
    assert smaller.only is not None and len(smaller.only) == 1
    _, again = run(smaller.seed, smaller.steps, Counter(), smaller.only)
    assert again == smaller
