"""Where the kernels' tensors lie, so that vLLM's sleep mode takes nothing from them that they need.

While it loads a model, vLLM lets torch allocate from a pool of its `CuMemAllocator` that sleep of level 2 empties:
weights are loaded again, and of the rest vLLM puts back the model's buffers alone. What SPLA keeps on the device is no
buffer, so that it goes to other pools, by the tags that vLLM has for its own such tensors. In all pools memory comes
back at the same addresses, so that bound launches and CUDA graphs hold.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..kernels.interface import Pool


def kept_pool() -> AbstractContextManager[Any]:
    """Memory whose contents are kept, whatever the level of sleep. Every pool takes 2 MiB at least."""
    return _use("runtime") if _sleeps() else nullcontext()


def scratch_pool() -> Pool:
    """Memory whose contents sleep drops, without a copy on the host; the same object for all that may share it."""
    return _use_scratch if _sleeps() else nullcontext


def _sleeps() -> bool:
    """Whether torch allocates from a pool of vLLM's now: nobody takes away what is in torch's own memory."""
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.instance
    return allocator is not None and allocator.current_tag != CuMemAllocator.default_tag


def _use_scratch() -> AbstractContextManager[Any]:
    return _use("workspace")


def _use(tag: str) -> AbstractContextManager[Any]:
    from vllm.device_allocator.cumem import CuMemAllocator

    return CuMemAllocator.get_instance().use_memory_pool(tag=tag)
