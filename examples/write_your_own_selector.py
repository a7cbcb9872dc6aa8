"""A selector of your own, on tensors alone: no engine, a second to run.

    python examples/write_your_own_selector.py

A selector says which numbers to keep of a block of keys and how a query ranks blocks by them. This one keeps the mean
and the largest deviation from it, and bounds the logits with Cauchy-Schwarz. To use one in vLLM, import the module
that registers it in every process, best through an entry point of the group `vllm.general_plugins` of your own. The
option `statistics_dtype: fp8` asks for one more method, `formats`, that says how each number is to be stored.
"""

import math

import torch

from spla_backend.algorithm.selectors import Selector, get_selector, register_selector, selector_names


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


if __name__ == "__main__":
    main()
