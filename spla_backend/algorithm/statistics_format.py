"""How statistics are stored: in the cache dtype, or in a byte an element (docs/design.md, 5).

Bytes need no scale. What has a sign (means, extremes of keys) is e4m3: up to 448 with 3 bits of mantissa. Variances are
e5m2, up to 57344: 2 bits of mantissa are enough for a sum of positive terms, whose roundings average out. Both become
float16 by moving bits, so that kernels on any GPU read them. Numbers beyond the ranges are stored as the largest ones.
"""

import torch

STATISTICS_DTYPES = ("auto", "fp8")
E4M3, E5M2, COUNT = "e4m3", "e5m2", "count"  # COUNT: an integer up to MAX_COUNT
MAX_COUNT = 255
Formats = tuple[tuple[str, int], ...]  # of consecutive elements: what they are, how many

_FLOATS = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def encode(statistics: torch.Tensor, formats: Formats) -> torch.Tensor:
    """Statistics `[..., width]` float as bytes `[..., width]` uint8, rounded to nearest."""
    parts = []
    for part, (kind, _) in zip(statistics.split([size for _, size in formats], -1), formats, strict=True):
        if kind == COUNT:
            parts.append(part.round().clamp(0, MAX_COUNT).to(torch.uint8))
        else:
            limit = torch.finfo(_FLOATS[kind]).max
            parts.append(part.clamp(-limit, limit).to(_FLOATS[kind]).view(torch.uint8))
    return torch.cat(parts, -1)


def decode(stored: torch.Tensor, formats: Formats) -> torch.Tensor:
    """What `encode` stored, `[..., width]` float32."""
    parts = []
    for part, (kind, _) in zip(stored.split([size for _, size in formats], -1), formats, strict=True):
        parts.append(part.float() if kind == COUNT else part.contiguous().view(_FLOATS[kind]).float())
    return torch.cat(parts, -1)
