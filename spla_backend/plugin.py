"""The entry points: `vllm.general_plugins` makes `--attention-backend spla` exist.

vLLM calls them in every process, some several times. They must be idempotent and light: no kernels, no Triton.
"""

import os

from .engine.interfaces import PLUGIN, find_missing
from .engine.registration import backend_member
from .engine.vllm_versions import ALLOW_UNTESTED


def register() -> None:
    """Register the backend and apply the run-time patches of `spla_backend.patches`.

    Where vLLM lacks what these need, it is left as it is, for the users of other backends, and the log says so:
    `--attention-backend spla` is then no backend that vLLM knows.
    """
    from .patches import platform

    missing = find_missing(PLUGIN + platform.INTERFACES)
    if missing:
        _warn_of(missing)
        return
    if ALLOW_UNTESTED in os.environ:
        _make_known(ALLOW_UNTESTED)
    backend_member()
    platform.apply()


def platform_plugin() -> None:
    """Entry point of `vllm.platform_plugins`, the one that vLLM's command line calls before anything else.

    It brings no platform (and says so by returning None), only the patch that such an early caller needs.
    """
    from .patches import vllm_cpu_metadata

    vllm_cpu_metadata.apply()


def _warn_of(missing: list[str]) -> None:
    import vllm

    from .engine.logger import logger

    logger.warning(
        "SPLA is not available as an attention backend: it uses vLLM's %s, which vLLM %s does not have. Install "
        "another vLLM or vllm-spla",
        ", ".join(missing),
        vllm.__version__,
    )


def _make_known(variable: str) -> None:
    """vLLM warns of variables that begin as its own do and that it does not know."""
    from vllm import envs

    envs.environment_variables.setdefault(variable, lambda: os.environ.get(variable))
