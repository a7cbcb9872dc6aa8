"""Without a GPU the Triton kernels are interpreted, which has to be decided before Triton is imported."""

import importlib.util
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # for triton_cases, under every import mode of pytest
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        import quick_interpreter

        quick_interpreter.install()
