"""Without a GPU the Triton kernels are interpreted, which has to be decided before Triton is imported."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for triton_cases, under every import mode of pytest
INTERPRETED = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
if INTERPRETED:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import quick_interpreter

    quick_interpreter.install()


@pytest.fixture(autouse=True)
def few_programs_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that stores 32 tokens is interpreted as fast as one that stores one: what makes a batch takes them.

    `test_triton_cache.py` stores both ways.
    """
    if INTERPRETED:
        monkeypatch.setattr("spla_backend.kernels.gpu.store.FEW_TOKENS", 4)


@pytest.fixture(autouse=True)
def no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention, over what prompts selected, cannot be interpreted."""
    if INTERPRETED:
        from plain_attention import attend_plainly

        monkeypatch.setattr("spla_backend.kernels.gpu.prefill.passes.attend_blocks", attend_plainly)
