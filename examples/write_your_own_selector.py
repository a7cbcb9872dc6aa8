"""A selector of your own, on tensors and on a GPU: no engine, some seconds to run.

    python examples/write_your_own_selector.py

A selector says which numbers to keep of a block of keys and how a query ranks blocks by them. This one keeps the mean
and the largest deviation from it, and bounds the logits with Cauchy-Schwarz. Its class is all that a CPU needs. A GPU
needs its device functions too, in Triton: how the numbers of a block are made, what they want of queries, and how
blocks are scored. They are checked against the class here, interpreted where there is no GPU.

To use one in vLLM, import the module that registers it in every process, best through an entry point of the group
`vllm.general_plugins` of your own. The option `statistics_dtype: fp8` asks for one more method, `formats`, that says
how each number is to be stored.
"""

import math
import os

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import triton
import triton.language as tl

from spla_backend.algorithm.selectors import Selector, get_selector, register_selector, selector_names
from spla_backend.kernels.gpu.check_selector import check_gpu_selector
from spla_backend.kernels.gpu.selectors import GpuSelector, register_gpu_selector
from spla_backend.kernels.gpu.statistics import (
    block_keys,
    block_mean,
    load_numbers,
    load_vectors,
    multiply,
    store_number,
    store_vector,
)


@register_selector
class BallSelector(Selector):
    """The block as a ball: `log b + q . mu + |q| r / 2`."""

    name = "ball"
    has_mass = False  # halfway to a bound: good for ranking, no estimate of the mass

    def width(self, head_size: int) -> int:
        return head_size + 1

    def statistics(self, keys: torch.Tensor) -> torch.Tensor:
        mean = keys.mean(-2)  # [..., head_size]
        radius = (keys - mean.unsqueeze(-2)).norm(dim=-1).amax(-1, keepdim=True)  # [..., 1]
        return torch.cat([mean, radius], -1)

    def score(self, q: torch.Tensor, statistics: torch.Tensor, block_size: int) -> torch.Tensor:
        mean, radius = statistics[..., :-1], statistics[..., -1]
        length = q.norm(dim=-1, keepdim=True)  # [..., queries, 1]
        return math.log(block_size) + q @ mean.mT + 0.5 * length * radius.unsqueeze(-2)


@triton.jit
def store(block):
    """`BallSelector.statistics` of a block whose keys come `TILE` at a time."""
    mean = block_mean(block)  # [DP]
    radius = 0.0
    for first in tl.static_range(0, block.UNIT, block.TILE):
        keys, _ = block_keys(block, first)  # [TILE, DP]
        deviation = keys - mean[None, :]
        radius = tl.maximum(radius, tl.max(tl.sqrt(tl.sum(deviation * deviation, axis=1)), axis=0))
    store_vector(block, 0, mean)
    store_number(block, block.D, radius)


@triton.jit
def prepare(q, scale, QUERY_ROWS: tl.constexpr, NAT: tl.constexpr):
    """Queries, and half their lengths in the units of the logits."""
    wide = q.to(tl.float32) * (0.5 * scale * NAT)
    return q, tl.sqrt(tl.sum(wide * wide, axis=1 if QUERY_ROWS else 0, keep_dims=True))


@triton.jit
def score(query, blocks):
    """`BallSelector.score` as an estimate of one term; neither a mass nor, which that would need, a mean key."""
    q, half_length = query
    logit = multiply(load_vectors(blocks, 0), q, blocks) * blocks.scale + blocks.offset
    return ((logit + half_length * load_numbers(blocks, blocks.D),),), (), ()


register_gpu_selector(BallSelector, GpuSelector(store, prepare, score))


def main() -> None:
    torch.manual_seed(0)
    block, blocks, head_size, budget = 64, 128, 64, 16
    # Keys of a block scatter around a direction of their own, some more, some less.
    spread = 0.2 + torch.rand(blocks, 1, 1)
    keys = torch.randn(blocks, 1, head_size) + spread * torch.randn(blocks, block, head_size)
    queries = torch.randn(256, head_size) * head_size**-0.5 * 2
    mass = torch.softmax((queries @ keys.flatten(0, 1).T), -1).unflatten(-1, (blocks, block)).sum(-1)

    print(f"attention mass in the best {budget} of {blocks} blocks")
    print(f"  {'oracle':10} {mass.topk(budget).values.sum(-1).mean():.3f}")
    for name in selector_names():
        selector = get_selector(name)
        scores = selector.score(queries, selector.statistics(keys), block)
        print(f"  {name:10} {mass.gather(-1, scores.topk(budget).indices).sum(-1).mean():.3f}")

    on_gpu = torch.cuda.is_available()
    check_gpu_selector(BallSelector.name, head_size=head_size, block=block, device="cuda" if on_gpu else "cpu")
    print(f"its device functions{'' if on_gpu else ', interpreted,'} say the same as its class")


if __name__ == "__main__":
    main()
