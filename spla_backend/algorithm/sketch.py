"""A sketch of keys in 4 bits an element: what the fine level may read in place of the keys (docs/design.md, 1 and 5).

A key, less the mean of its selection block as the statistics have it, is cut into chunks of 32 channels. Of a chunk are
kept a scale, by which the element farthest from 0 becomes -8, and of each element the nearest of the 16 multiples
`-8 .. 7` of the scale. The last chunk of a head that is no multiple of 32 is filled up with zeros.
"""

import torch

from .parameters import SplaParameters

CHUNK = 32
"""Channels that share a scale."""
BYTES_PER_CHUNK = CHUNK // 2 + 2
"""Of a token: codes and scale."""
FINE_SOURCES = ("keys", "int4")
"""What the fine level reads: the keys themselves, or this sketch of them."""


def num_chunks(head_size: int) -> int:
    """Chunks of a key."""
    return -(-head_size // CHUNK)


def sketch(keys: torch.Tensor, centre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of keys.

    Args:
        keys: `[..., head_size]` float32 or float64, as they are stored.
        centre: What is taken off them first, of a shape that broadcasts. All that follows is float32, so that whatever
            makes a sketch makes the same.

    Returns:
        Codes `[..., chunks * 16]` uint8, 8 more than the multiples: the lower half of byte `i` is of channel `2 i`, the
        upper half of `2 i + 1`; scales `[..., chunks]` float16.
    """
    rest = (keys - centre).float()
    chunks = torch.nn.functional.pad(rest, (0, -rest.shape[-1] % CHUNK)).unflatten(-1, (-1, CHUNK))
    high, low = chunks.amax(-1), -chunks.amin(-1)
    limit = torch.finfo(torch.float16).max
    scales = (torch.where(high >= low, -high, low) / 8).clamp(-limit, limit).half()
    scale = scales.float().masked_fill(scales == 0, torch.inf)[..., None]  # of which all is 0 times as much
    codes = (chunks / scale).round_().clamp_(-8, 7).add_(8).to(torch.uint8).unflatten(-1, (-1, 2))
    return (codes[..., 0] | codes[..., 1] << 4).flatten(-2), scales


def unsketch(codes: torch.Tensor, scales: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """What a sketch says the keys are, `[..., head_size]`, in the dtype of `centre`; arguments as of `sketch`."""
    multiples = torch.empty(*codes.shape, 2, dtype=centre.dtype, device=centre.device)
    multiples[..., 0], multiples[..., 1] = codes & 15, codes >> 4
    chunks = multiples.flatten(-2).sub_(8).unflatten(-1, (-1, CHUNK))
    rest = chunks.mul_(scales.to(centre.dtype)[..., None]).flatten(-2)
    return rest[..., : centre.shape[-1]] + centre


@torch.no_grad()
def read_keys(keys: torch.Tensor, statistics: torch.Tensor, params: SplaParameters) -> torch.Tensor:
    """Keys of whole selection blocks `[..., blocks, block_size, head_size]` with statistics `[..., blocks, width]`
    (`block_statistics`) as the fine level reads them, without gradients: they choose."""
    if not params.has_sketch:
        return keys
    centre = statistics[..., None, : keys.shape[-1]]
    return unsketch(*sketch(keys, centre), centre)
