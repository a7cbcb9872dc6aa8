"""Sequences that nobody has seen: `python -m tests.engine.fuzz --seed 0 --minutes 10`."""

import os
import sys

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported

from .cli import main
from .driver import Run

if __name__ == "__main__":
    sys.exit(main(Run))
