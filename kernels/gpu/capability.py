"""What NVIDIA GPUs have, by compute capability.

Source: CUDA C++ Programming Guide, technical specifications per compute capability.
"""

LEAST = (8, 0)
"""The first with what FlashAttention and our kernels need: bfloat16 on tensor cores."""
HOPPER = 9
"""The generation for which `decode/fused.cu` was written and on which alone it was run."""
_WIDE = {(8, 0), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0)}


def is_narrow(capability: tuple[int, int]) -> bool:
    """Whether a thread block may have but 99 KiB of shared memory, where others have 163 or 227: so it is with consumer
    cards (8.6, 8.9, 12.x), and is taken to be with what is not known."""
    return capability not in _WIDE


def has_tensor_memory(capability: tuple[int, int]) -> bool:
    """Whether sums of matrix products are in a memory of their own, which ends at 512 columns."""
    return capability[0] in (10, 11)
