"""Reductions whose lanes Triton 3.6 does not bring together: what is in the TTGIR of a compiled kernel.

A number of a tensor's coordinates says which lane of a warp holds an element; a layout names the coordinates that every
bit of that number adds. Triton sums along an axis by exchanging, from the lowest of the bits that belong to the axis
on, as many bits as belong to it. Where a bit of another axis, or of none, lies between them, lanes are added that hold
the same elements, and others are left out: the sums are wrong, and nothing says so. Only `#ttg.linear` layouts can be
like that. Triton 3.6.0 chooses them, seen on an H200; cause: `ReduceOpHelper::getThreadOffsetOnReductionAxis` in its
`lib/Analysis/Utility.cpp`. This can go when no supported vLLM comes with a Triton that has it.
"""

import re
from collections.abc import Iterator
from typing import TypeAlias

Bases: TypeAlias = list[list[int]]
"""Of every bit of a lane's number, the coordinates that it adds."""

NEIGHBOURS = ("#ttg.blocked<", "#ttg.nvidia_mma<", "#ttg.dot_op<")
"""Layouts in which the lanes of an axis are always neighbours."""


def scattered_reductions(ttgir: str) -> list[str]:
    """The reductions of a kernel that give wrong sums, a line each: the tensor, its axis and its lanes.

    Args:
        ttgir: Text of the module, `compiled.asm["ttgir"]`.

    Raises:
        ValueError: A reduction, or the layout of one, that cannot be read; it would go unchecked.
    """
    aliases = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", ttgir, re.MULTILINE))
    found = []
    for axis, shape, layout in _reductions(ttgir):
        lanes = lane_bases(layout, aliases)
        if lanes is None:
            continue
        # A coordinate beyond the tensor is one that it has already.
        bits = [bit for bit, base in enumerate(lanes) if 0 < base[axis] < shape[axis]]
        if bits and bits[-1] - bits[0] + 1 != len(bits):
            found.append(f"reduction over axis {axis} of {'x'.join(map(str, shape))}: lane = {lanes}")
    return found


def lane_bases(layout: str, aliases: dict[str, str]) -> Bases | None:
    """Which coordinates the bits of a lane's number add; None where those of an axis are neighbours anyway.

    Args:
        layout: Text of the layout, or its alias.
        aliases: The module's layouts by alias.

    Raises:
        ValueError: A layout of an unknown kind.
    """
    layout = aliases.get(layout, layout)
    if layout.startswith(NEIGHBOURS):
        return None
    if sliced := re.fullmatch(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>", layout):
        parent = lane_bases(sliced[2], aliases)
        dim = int(sliced[1])
        return parent and [base[:dim] + base[dim + 1 :] for base in parent]
    if layout.startswith("#ttg.linear<") and (lane := re.search(r"\blane = \[(.*?)\], \w+ = ", layout)):
        return [[int(x) for x in base.split(",")] for base in re.findall(r"\[([\d, ]+)\]", lane[1])]
    raise ValueError(f"the lanes of layout {layout} are not known: teach scattered_reductions.py to read it")


def _reductions(ttgir: str) -> Iterator[tuple[int, list[int], str]]:
    """Axis, shape and layout of what every reduction goes over."""
    lines = ttgir.splitlines()
    for number, line in enumerate(lines):
        if '"tt.reduce"' not in line:
            continue
        # Its body ends where a line begins with the brace as far in as it began itself.
        end = " " * (len(line) - len(line.lstrip())) + "}) : ("
        types = next((text for text in lines[number:] if text.startswith(end)), "")
        axis = re.search(r"axis = (\d+) : i32", line)
        tensor = re.search(r"\}\) : \(tensor<((?:\d+x)+)[^,]+, ", types)
        if axis is None or tensor is None:
            raise ValueError(f"a reduction cannot be read: {line.strip()} ... {types.strip()}")
        shape = [int(size) for size in tensor[1].rstrip("x").split("x")]
        yield int(axis[1]), shape, _balanced(types[tensor.end() :])


def _balanced(text: str) -> str:
    """As much of the beginning of `text` as closes the brackets that it opens, without the one after it."""
    depth = 0
    for end, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if depth < 0:
            return text[:end]
    raise ValueError(f"no layout ends in {text}")
