"""Metadata of a step: what block selection and attention need, made once for all layers."""

from collections.abc import Hashable
from dataclasses import dataclass

from vllm.v1.attention.backend import AttentionMetadata

from ..kernels.interface import Plan


@dataclass
class SplaMetadata(AttentionMetadata):
    """One step of one group of layers."""

    plans: dict[Hashable, Plan]
    """What the kernels planned for this step, by their `plan_key`; see `kernels/interface.py`."""
