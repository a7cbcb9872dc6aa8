"""Gains and scales of the residual, fitted to a frozen model by distillation from its own dense attention.

What is lowered is the divergence of the model's next-token distributions under SPLA from those under dense attention,
with Adam, through the whole model: a gain that lowers the error of its layer's output need not lower the loss.
Which blocks are selected is not differentiated through.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..algorithm.parameters import SplaParameters
from ..evaluate.capture import CapturingModel
from ..evaluate.fidelity import attention
from ..evaluate.variants import exact_up_to
from ..learned import LayerParameters

_LOSS_CHUNK = 512  # positions whose distributions over the vocabulary are compared at a time
_MIN_GAIN, _MAX_GAIN = 1e-3, 20.0
_FEATURE_RATE = 0.05


class HeadParameters:
    """What is fitted: a gain for every head of every layer, a scale for every layer, matrices before the feature map.

    Args:
        layers: Indices of the layers of full attention.
        num_heads: Query heads.
        params: What SPLA computes; a residual whose direction has no scale gets gains alone.
        device: Where the model is.
        features: `(num_kv_heads, head_size)` where the feature map of the `linear` residual is fitted, too.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_heads: int,
        params: SplaParameters,
        device: torch.device | str,
        features: tuple[int, int] | None = None,
    ) -> None:
        self._indices = tuple(layers)
        self.log_gain = torch.zeros(len(layers), num_heads, device=device, requires_grad=True)
        self.scale: torch.Tensor | None = None
        if params.residual == "regression":
            self.scale = torch.full((len(layers), 1), float(params.residual_scale), device=device, requires_grad=True)

        self.feature_weight: torch.Tensor | None = None
        if features is not None:
            num_kv_heads, size = features
            weight = torch.eye(size, device=device).repeat(len(layers), num_kv_heads, 1, 1)
            self.feature_weight = weight.requires_grad_()

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """What an optimiser changes, and how fast: elements of a matrix are many and move an output together."""
        numbers = [self.log_gain] if self.scale is None else [self.log_gain, self.scale]
        groups: list[dict[str, Any]] = [{"params": numbers, "lr": learning_rate}]
        if self.feature_weight is not None:
            groups.append({"params": [self.feature_weight], "lr": learning_rate * _FEATURE_RATE})
        return groups

    def _layer(self, i: int) -> LayerParameters:
        """Of the `i`-th of these layers."""
        return LayerParameters(
            gain=self.log_gain[i].exp(),
            residual_scale=None if self.scale is None else self.scale[i],
            feature_weight=None if self.feature_weight is None else self.feature_weight[i],
        )

    def layers(self) -> dict[int, LayerParameters]:
        """By index of the model's layers, differentiable where gradients are enabled."""
        return {layer: self._layer(i) for i, layer in enumerate(self._indices)}

    def clamp(self) -> None:
        """Keep what is fitted where it means something."""
        with torch.no_grad():
            self.log_gain.clamp_(*(torch.tensor([_MIN_GAIN, _MAX_GAIN]).log().tolist()))
            if self.scale is not None:
                self.scale.clamp_(0.0, 2.0)


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
    layers: Mapping[int, SplaParameters],
    fitted: HeadParameters,
    *,
    steps: int,
    learning_rate: float,
    report: Callable[[float], None],
) -> None:
    """Fit gains and scales, a document a step, the documents in turn.

    Args:
        model: The frozen model, with its head.
        documents: Token ids, each longer than what is attended to whole.
        layers: What SPLA computes, with a residual under a shared normaliser; layers that are not named stay dense.
        fitted: Where to start; changed in place.
        steps: Steps of Adam.
        learning_rate: Its rate at the start; it falls to a tenth along a cosine.
        report: Gets the divergence of every step, before it changes anything.
    """
    optimizer = torch.optim.Adam(fitted.groups(learning_rate), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.55 + 0.45 * math.cos(math.pi * min(step / max(steps, 1), 1.0))
    )
    exact = exact_up_to(layers)
    for step in range(steps):
        tokens = documents[step % len(documents)]
        with torch.no_grad():
            teacher = model.forward(tokens, None).logits[0, exact:]
        visit = partial(attention, params=layers, learned=fitted.layers())
        loss = divergence(teacher, model.forward(tokens, visit).logits[0, exact:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        fitted.clamp()
        report(loss.item())
