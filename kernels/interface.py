"""What the engine asks of a layer's kernels, whatever the device. `dispatch.make` makes them.

A step of the engine goes `update_cache` (every layer), `plan` (once for all layers of one `plan_key`), `run` (every
layer).
"""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .layout import PageLayout, StateLayout

Pool = Callable[[], AbstractContextManager[Any]]
"""Memory that torch allocates from within the context that this returns."""


@dataclass(frozen=True)
class Layer:
    """What one attention layer is, beside the `SplaParameters` that it computes; the heads are those of this rank."""

    num_heads: int  # H
    num_kv_heads: int  # G
    head_size: int  # d
    cache_dtype: torch.dtype  # of keys, values and statistics; states are float32 in the same memory
    scale: float  # softmax scale; queries arrive unscaled
    gain: torch.Tensor | None = None  # [H], weight of the tail; None: 1
    norm_weights: tuple[torch.Tensor, torch.Tensor] | None = None  # exact [H, d], tail [H, d], of double RMSNorm; 1
    feature_weight: torch.Tensor | None = None  # [G, d, d], applied to queries and keys before the feature map
    # [H], logits that have no value: the model's own parameter, which it may load again in place. So kernels keep the
    # tensor itself, whatever its dtype, and read it in every step.
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Limits:
    """The largest step, for scratch that is allocated once."""

    max_num_rows: int
    max_query_len: int  # of a decode row
    max_model_len: int
    max_num_tokens: int
    prefill_dense_below: int  # prompt tokens at positions below it attend to everything, as those below the budget do
    largest_budget: int  # selection blocks, of any layer that selects
    # Whether prompt tokens of short steps attend to everything further on, up to where selecting takes less time.
    where_it_pays: bool = False


@dataclass(frozen=True)
class Step:
    """The rows of one step, decode rows first. The tensors are on the device; the numbers are what the host knows.

    Lengths of decode rows are read on the device alone: the host may not know them yet, see `engine/builder.py`.
    """

    query_start_loc: torch.Tensor  # [rows + 1] int32, where each row's query tokens begin in the batch
    seq_lens: torch.Tensor  # [rows] int32, tokens of each sequence, this step's included; 0: padding
    block_table: torch.Tensor  # [rows, max_pages] int32, page ids
    num_decodes: int  # leading rows of at most `decode_query_len` query tokens each, padding (of none) included
    num_decode_tokens: int  # theirs, padding included
    decode_query_len: int
    prefill_starts: list[int]  # [prefill rows + 1], where the other rows' query tokens begin, and where the last ends
    prefill_lens: list[int]  # [prefill rows], tokens of their sequences, this step's included; exact

    @classmethod
    def of(
        cls,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        decode_query_len: int = 1,
    ) -> "Step":
        """A step whose lengths are on the host: leading rows of up to `decode_query_len` tokens are its decode rows."""
        starts = query_start_loc.tolist()
        longer = (row for row, (a, b) in enumerate(pairwise(starts)) if b - a > decode_query_len)
        num_decodes = next(longer, len(starts) - 1)
        return cls(
            query_start_loc,
            seq_lens,
            block_table,
            num_decodes=num_decodes,
            num_decode_tokens=starts[num_decodes],
            decode_query_len=decode_query_len,
            prefill_starts=starts[num_decodes:],
            prefill_lens=seq_lens[num_decodes:].tolist(),
        )


class Plan:
    """What a layer's kernels planned for a step; only kernels of the same `plan_key` look into it."""


PlanT = TypeVar("PlanT", bound=Plan)


class PagedAttention(Protocol[PlanT]):
    """SPLA, or dense attention beside it, of one layer over the engine's pages."""

    @property
    def page_layout(self) -> PageLayout:
        """Bytes of a page."""

    @property
    def state_layout(self) -> StateLayout:
        """Bytes of a state block."""

    @property
    def prefill_dense_below(self) -> int:
        """Position below which prompt tokens attend to everything."""

    @property
    def scratch_bytes(self) -> int:
        """Bytes that the layer keeps between its launches; layers of one geometry share them."""

    @property
    def tokens_read(self) -> NDArray[np.int32] | None:
        """`[rows, kv_heads]`, tokens of the blocks that the exact part of the last decode rows read; None where the
        kernels do not count."""

    @property
    def plan_key(self) -> Hashable:
        """Layers of one model whose keys are equal share their plans."""

    def update_cache(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Store keys and values; make statistics and stamp of every page whose last slot is written.

        Args:
            key: `[tokens, kv_heads, head_size]`, heads dense.
            value: As `key`.
            kv_cache: `[num_pages, kv_heads, page_size + statistics_rows, 2 * head_size]`, rows dense.
            slot_mapping: `[tokens]` int64, `page * page_size + offset`, -1 for padding. Tokens of one sequence stand
                side by side in ascending order.
        """

    def plan(self, step: Step) -> PlanT:
        """What a step needs whatever the layer."""

    def run(
        self,
        plan: PlanT,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Attention of one layer.

        Args:
            plan: The step's plan.
            query: `[tokens, heads, head_size]`, unscaled, heads dense.
            kv_cache: `[num_pages, kv_heads, page_size + statistics_rows, 2 * head_size]`, this step's tokens already in
                it.
            state_cache: As `kv_cache`, recurrent-state blocks; None without a residual.
            state_table: `[rows, >= K]` int32, state blocks of each row; None without a residual.
            output: `[tokens, heads, head_size]`, written for every query token of the plan.
        """
