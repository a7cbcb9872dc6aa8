"""Learned attention sinks as the kernels read them: logits `[H]` of any dtype, the model's own parameter
(`kernels/interface.py::Layer`). Kernels of layers without sinks take None for it, and have the machine code that they
would have if there were none anywhere."""

import triton
import triton.language as tl


@triton.jit
def load_sinks(sink_ptr, heads, exists):
    """The sinks of some query heads as float32; where there is no head -inf, which takes no part in a sum of
    exponentials."""
    return tl.load(sink_ptr + heads, mask=exists, other=float("-inf")).to(tl.float32)
