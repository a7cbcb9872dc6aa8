"""SPLA among vLLM's attention backends: the name and path it is registered under. Imports nothing heavy."""

from typing import Any

BACKEND_NAME = "SPLA"
BACKEND_PATH = "spla_backend.engine.backend.SplaBackend"


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
