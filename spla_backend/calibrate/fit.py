"""Gains and scales of the residual, fitted to a frozen model by distillation from its own dense attention.

What is lowered is the divergence of the model's next-token distributions under SPLA from those under dense attention,
with Adam, through the whole model: a gain that lowers the error of its layer's output need not lower the loss.
Which blocks are selected is not differentiated through, nor are the statistics of blocks.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..algorithm.parameters import SplaParameters
from ..algorithm.selectors import get_selector
from ..evaluate.capture import AttentionInputs, CapturingModel
from ..evaluate.fidelity import HeadGroup, Point
from ..learned import LayerParameters

_CHUNK = {"cpu": 256}  # queries of a head group at a time: on a CPU what they make stays in its caches
_DEFAULT_CHUNK = 1024  # bounds the memory of a backward pass
_LOSS_CHUNK = 512  # positions whose distributions over the vocabulary are compared at a time
_MIN_GAIN, _MAX_GAIN = 1e-3, 20.0


class HeadParameters:
    """What is fitted: a gain for every head of every layer, and a scale for every layer.

    Args:
        num_layers: Layers of the model.
        num_heads: Query heads.
        params: What SPLA computes; a residual whose direction has no scale gets gains alone.
        device: Where the model is.
    """

    def __init__(self, num_layers: int, num_heads: int, params: SplaParameters, device: torch.device | str) -> None:
        shape = num_layers, num_heads
        self.log_gain = torch.zeros(shape, device=device, requires_grad=True)
        self.scale: torch.Tensor | None = None
        if params.residual == "regression":
            self.scale = torch.full((num_layers, 1), params.residual_scale, device=device, requires_grad=True)

    def tensors(self) -> list[torch.Tensor]:
        """What an optimiser changes."""
        return [self.log_gain] if self.scale is None else [self.log_gain, self.scale]

    def layer(self, i: int) -> LayerParameters:
        """Of one layer, differentiable."""
        return LayerParameters(
            gain=self.log_gain[i].exp(), residual_scale=None if self.scale is None else self.scale[i]
        )

    def layers(self) -> dict[int, LayerParameters]:
        """Of all layers, no longer differentiable."""
        with torch.no_grad():
            return {i: self.layer(i).to("cpu") for i in range(self.log_gain.shape[0])}

    def clamp(self) -> None:
        """Keep what is fitted where it means something."""
        with torch.no_grad():
            self.log_gain.clamp_(*(torch.tensor([_MIN_GAIN, _MAX_GAIN]).log().tolist()))
            if self.scale is not None:
                self.scale.clamp_(0.0, 2.0)


def attend(inputs: AttentionInputs, params: SplaParameters, fitted: HeadParameters) -> torch.Tensor:
    """As `fidelity.attention`, differentiable by queries, keys, values and what is fitted.

    Args:
        inputs: Of one layer.
        params: What to compute, with a residual.
        fitted: Of all layers.

    Returns:
        `[num_heads, length, head_size]` float32.
    """
    num_kv_heads, length, _ = inputs.k.shape
    q = inputs.q.float().unflatten(0, (num_kv_heads, -1))  # [kv_heads, group, length, head_size]
    k, v = inputs.k.float(), inputs.v.float()
    learned = fitted.layer(inputs.layer)
    # Tokens within the budget attend to everything, and have no tail to differentiate.
    dense = min(length, params.budget_blocks * params.selection_block)
    keys, values = (x[:, None, :dense].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    parts = [F.scaled_dot_product_attention(q[:, :, :dense], keys, values, is_causal=True, scale=1.0)]
    block = params.selection_block
    with torch.no_grad():
        blocks = k[:, : length // block * block].unflatten(1, (-1, block))
        statistics = get_selector(params.selector).statistics(blocks)  # [kv_heads, num_blocks, width]
    chunk = _CHUNK.get(k.device.type, _DEFAULT_CHUNK)
    for start in range(dense, length, chunk):
        end = min(start + chunk, length)
        positions = torch.arange(start, end, device=k.device)
        groups = []
        for g in range(num_kv_heads):
            mine = learned.heads(g, num_kv_heads)
            tensors = q[g, :, start:end].transpose(0, 1).contiguous(), k[g, :end], v[g, :end]
            known = {(params.selector, block): statistics[g]}
            with torch.no_grad():
                rest = HeadGroup(*tensors, positions, known).select(Point(params))
            # Not kept but computed again on the way back: what is as large as the logits.
            run = partial(_output, positions=positions, statistics=known, rest=rest, params=params)
            groups.append(
                checkpoint(run, *tensors, mine.gain, mine.residual_scale, use_reentrant=False).transpose(0, 1)
            )
        parts.append(torch.stack(groups))
    return torch.cat(parts, 2).flatten(0, 1)


def _output(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor,
    scale: torch.Tensor | None,
    *,
    positions: torch.Tensor,
    statistics: dict[tuple[str, int], torch.Tensor],
    rest: torch.Tensor,
    params: SplaParameters,
) -> torch.Tensor:
    group = HeadGroup(q, k, v, positions, statistics)
    return group.output(rest, params, LayerParameters(gain=gain, residual_scale=scale))


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of the student's distributions from the teacher's.

    Args:
        teacher: Logits `[positions, vocabulary]`.
        student: The same.
    """

    def one(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a.float().log_softmax(-1), b.float().log_softmax(-1)
        return F.kl_div(b, a, reduction="sum", log_target=True)

    pieces = zip(teacher.split(_LOSS_CHUNK), student.split(_LOSS_CHUNK), strict=True)
    total = torch.stack([checkpoint(one, a, b, use_reentrant=False) for a, b in pieces]).sum()
    return total / teacher.shape[0]


def fit(
    model: CapturingModel,
    documents: Sequence[Sequence[int]],
    params: SplaParameters,
    fitted: HeadParameters,
    *,
    steps: int,
    learning_rate: float,
    report: Callable[[float], None],
) -> None:
    """Fit gains and scales, a document a step, the documents in turn.

    Args:
        model: The frozen model, with its head.
        documents: Token ids, each longer than the budget.
        params: What SPLA computes, with a residual under a shared normaliser.
        fitted: Where to start; changed in place.
        steps: Steps of Adam.
        learning_rate: Its rate at the start; it falls to a tenth along a cosine.
        report: Gets the divergence of every step, before it changes anything.
    """
    optimizer = torch.optim.Adam(fitted.tensors(), lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=learning_rate / 10)
    budget = params.budget_blocks * params.selection_block
    visit = partial(attend, params=params, fitted=fitted)
    for step in range(steps):
        tokens = documents[step % len(documents)]
        with torch.no_grad():
            teacher = model.forward(tokens, None).logits[0, budget:]
        loss = divergence(teacher, model.forward(tokens, visit).logits[0, budget:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        fitted.clamp()
        report(loss.item())
