"""Train a model with SPLA attention, in transformers (docs/training.md)."""

from .attention import spla_attention
from .model import attach, fit_norms, save

__all__ = ["attach", "fit_norms", "save", "spla_attention"]
