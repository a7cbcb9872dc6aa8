"""Launches of Triton kernels whose arguments are the same for many layers, without looking at each of them again.

Triton's own launch takes 20 to 50 microseconds of Python a kernel: it binds the arguments, decides what each of them
specialises the kernel for, and finds the compiled kernel by that. A step's layers differ in a few addresses only, so a
`Launch` does this once, and then hands addresses to the compiled kernel.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton

_compiled: dict[tuple, Any] = {}
"""Compiled kernels by everything that Triton specialises them for."""


def _specialised(value: Any) -> Any:
    """What Triton may specialise a kernel for in an argument that is no tensor of a layer."""
    if isinstance(value, bool) or not isinstance(value, int):
        return type(value)
    return value == 1, value % 16 == 0, -(2**31) <= value < 2**31


class Launch:
    """A kernel with its grid and arguments.

    Args:
        kernel: What `triton.jit` made.
        grid: Programs, of up to three dimensions.
        arguments: By the kernel's names, without compile-time constants. A string stands for a tensor that each layer
            has of its own; other tensors are 16-byte aligned, as torch allocates them.
        constants: Compile-time constants by the kernel's names, and launch options such as `num_warps`.
        layer: Strides, dtypes and alignment of the layers' own tensors: layers for which it is equal may share the
            launch.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: Mapping[str, Any],
        constants: Mapping[str, Any],
        layer: tuple,
    ) -> None:
        self._kernel, self._grid = kernel, grid + (1,) * (3 - len(grid))
        self._arguments, self._constants = arguments, constants
        specialised = ((name, _specialised(x)) for name, x in arguments.items())
        self._key = (kernel, layer, *specialised, *constants.items())
        self._run: Any = None
        self._values: list[Any] = []
        self._own: list[tuple[int, str]] = []  # places of the layer's own tensors among the values

    def __call__(
        self, addresses: Mapping[str, int], tensors: Callable[[], Mapping[str, torch.Tensor]], stream: int | None
    ) -> None:
        """Launch for one layer.

        Args:
            addresses: Of the layer's own tensors.
            tensors: Those tensors; called only where the kernel has yet to be compiled.
            stream: CUDA stream; None where kernels are interpreted.
        """
        if self._run is None and not self._bind():
            own = tensors()
            arguments = {name: own[x] if isinstance(x, str) else x for name, x in self._arguments.items()}
            compiled = self._kernel[self._grid](**arguments, **self._constants)
            if stream is not None:
                _compiled[self._key] = compiled
            return
        values = self._values
        for index, name in self._own:
            values[index] = addresses[name]
        self._run(*values, stream=stream)

    def _bind(self) -> bool:
        """Look for the compiled kernel; where it is, take addresses for tensors."""
        compiled = _compiled.get(self._key)
        if compiled is None:
            return False
        self._run = compiled[self._grid]
        # A compiled kernel takes its constants too, in their places, and does not look at them.
        values = [self._arguments.get(name) for name in self._kernel.arg_names]
        self._values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in values]
        self._own = [(place, x) for place, x in enumerate(values) if isinstance(x, str)]
        return True


def layer_of(own: Mapping[str, torch.Tensor]) -> tuple[dict[str, int], tuple]:
    """The addresses of a layer's own tensors, and what of them is equal for layers that may share a `Launch`."""
    addresses = {name: tensor.data_ptr() for name, tensor in own.items()}
    alike = (*((x.stride(), x.dtype) for x in own.values()), *(address % 16 for address in addresses.values()))
    return addresses, alike


def current_stream(device: torch.device) -> int | None:
    """The stream that launches go to; None on a CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return None
    return triton.runtime.driver.active.get_current_stream(torch.cuda.current_device())


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Beside:
    """A launch on a second stream: behind what the current one was given, beside what it is given up to a `Join`."""

    def __init__(self, launch: Launch, device: torch.device) -> None:
        self._launch, self._device = launch, device

    def __call__(
        self, addresses: Mapping[str, int], tensors: Callable[[], Mapping[str, torch.Tensor]], stream: int | None
    ) -> None:
        """Launch for one layer, as `Launch` does."""
        if stream is None:
            self._launch(addresses, tensors, None)
            return
        second = _second_stream(self._device)
        second.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(second):  # for Triton's own launch, of a kernel that has yet to be compiled
            self._launch(addresses, tensors, second.cuda_stream)


class Join:
    """Has the current stream wait for what was launched beside it; called as launches are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(
        self, addresses: Mapping[str, int], tensors: Callable[[], Mapping[str, torch.Tensor]], stream: int | None
    ) -> None:
        """Wait, where there are streams."""
        if stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(_second_stream(self._device))
