"""Without a GPU the Triton kernels are interpreted, which has to be decided before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
