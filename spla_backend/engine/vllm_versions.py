"""Which versions of vLLM SPLA starts with: those that its tests were run with, and others where the user says so.
Imports nothing heavy."""

import os

from ..patches import draft_groups, local_attention
from . import interfaces

SUPPORTED_VLLM = ("0.32", "0.33")
ALLOW_UNTESTED = "VLLM_SPLA_ALLOW_UNTESTED_VLLM"
_INSTALL = f"install vLLM {' or '.join(v + '.x' for v in SUPPORTED_VLLM)}"


def is_tested(version: str) -> bool:
    """Whether SPLA was tested with a release of this minor version. Builds between releases were not."""
    from packaging.version import InvalidVersion, Version

    try:
        parsed = Version(version)
    except InvalidVersion:  # vLLM calls itself "dev" where it does not know better
        return False
    return ".".join(map(str, parsed.release[:2])) in SUPPORTED_VLLM and not parsed.is_prerelease


def is_allowed() -> bool:
    """Whether the user wants to try versions that were not tested."""
    return os.environ.get(ALLOW_UNTESTED, "0") == "1"


def check_vllm(version: str) -> None:
    """Of a version that was not tested, the interfaces decide, if the user wants to try it.

    Raises:
        ValueError: It was not tested with SPLA, or lacks what SPLA uses.
    """
    from .logger import logger

    if is_tested(version):
        return
    if not is_allowed():
        raise ValueError(
            f"SPLA was not tested with vLLM {version}, whose internal interfaces change between releases: "
            f"{_INSTALL}, or a newer vllm-spla, or set {ALLOW_UNTESTED}=1 to try it"
        )
    missing = find_missing()
    if missing:
        raise ValueError(f"SPLA uses vLLM's {', '.join(missing)}, which vLLM {version} does not have: {_INSTALL}")
    logger.warning_once(
        "SPLA was not tested with vLLM %s. All interfaces that it uses are there, but what they do may have changed: "
        "compare answers with those of dense attention first",
        version,
    )


def find_missing() -> list[str]:
    """The interfaces that SPLA uses on this device and this vLLM does not have. Without those of `patches/platform.py`
    the plugin does not register the backend (`plugin.py`)."""
    return interfaces.find_missing(interfaces.of_this_device() + local_attention.INTERFACES + draft_groups.INTERFACES)
