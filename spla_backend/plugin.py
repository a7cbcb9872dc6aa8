"""The entry points: `vllm.general_plugins` makes `--attention-backend spla` exist.

vLLM calls them in every process, some several times. They must be idempotent and light: no kernels, no Triton.
"""

from typing import Any

BACKEND_NAME = "SPLA"
BACKEND_PATH = "spla_backend.engine.backend.SplaBackend"


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


def backend_member() -> Any:
    """The `AttentionBackendEnum` member of SPLA, registered on first use.

    vLLM pickles a config with the member by value, and a spawned engine process unpickles it before plugins load,
    so that the value is unknown there ("is not a valid AttentionBackendEnum"). Pickling it as a call of this
    function registers it in time.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        member = AttentionBackendEnum.register(BACKEND_NAME, BACKEND_PATH)
        member.__reduce_ex__ = _reduce
    return AttentionBackendEnum[BACKEND_NAME]


def _reduce(protocol: int) -> tuple[Any, tuple[()]]:
    return backend_member, ()
