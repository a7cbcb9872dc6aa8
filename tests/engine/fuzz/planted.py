"""Faults of the engine's code that a fuzzer must find."""

from collections import Counter
from collections.abc import Iterable

import pytest
import torch

from spla_backend.kernels.cpu.vectorised import VectorisedAttention

from .driver import Failure, Run, run


def stamps_without_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages of a number have the same stamp: a request may take another one's state for its own."""
    never = property(lambda self: 0, lambda self, value: None)
    monkeypatch.setattr(VectorisedAttention, "_counter", never, raising=False)


def statistics_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of a page are not made again where there are some, of another request or of a rejected draft."""
    original = VectorisedAttention._write_statistics

    def once(self: VectorisedAttention, kv_cache: torch.Tensor, pages: torch.Tensor) -> None:
        done = (self._stamp(kv_cache, pages)[:, 0, :2] == self._salt).all(-1)
        if not done.all():
            original(self, kv_cache, pages[~done])

    monkeypatch.setattr(VectorisedAttention, "_write_statistics", once)


def first_failure(kind: type[Run], steps: int, seeds: Iterable[int]) -> Failure:
    """Of worlds of a kind, one after the other."""
    failures = (run(seed, steps, Counter(), kind=kind)[1] for seed in seeds)
    return next(failure for failure in failures if failure is not None)
