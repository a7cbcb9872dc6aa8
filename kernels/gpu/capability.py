"""What NVIDIA GPUs have, by compute capability.

Source: CUDA C++ Programming Guide, technical specifications per compute capability.
"""

LEAST = (8, 0)
"""The first with what FlashAttention and our kernels need: bfloat16 on tensor cores."""
HOPPER = 9
"""The generation for which `decode/fused.cu` was written and on which alone it was run."""
_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
_LEAST_SHARED_KIB = 99  # consumer cards (8.6, 8.9, 12.x), and what is not known


def shared_bytes(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a thread block may have."""
    return _SHARED_KIB.get(capability, _LEAST_SHARED_KIB) << 10
