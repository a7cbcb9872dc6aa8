"""The entry points: `vllm.general_plugins` makes `--attention-backend spla` exist.

vLLM calls them in every process, some several times. They must be idempotent and light: no kernels, no Triton.
"""

from .engine.registration import backend_member


def register() -> None:
    """Register the backend and apply the run-time patches of `spla_backend.patches`."""
    backend_member()
    from .patches import platform

    platform.apply()


def platform_plugin() -> None:
    """Entry point of `vllm.platform_plugins`, the one that vLLM's command line calls before anything else.

    It brings no platform (and says so by returning None), only the patch that such an early caller needs.
    """
    from .patches import vllm_cpu_metadata

    vllm_cpu_metadata.apply()
