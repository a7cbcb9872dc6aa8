import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _vllm_says_what_it_said_before() -> Iterator[None]:
    """`spla-eval` sets how much vLLM logs, which tests after these in the process must not find."""
    before = os.environ.get("VLLM_LOGGING_LEVEL")
    yield
    os.environ.pop("VLLM_LOGGING_LEVEL", None)
    if before is not None:
        os.environ["VLLM_LOGGING_LEVEL"] = before
