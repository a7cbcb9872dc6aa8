"""What a sequence's outputs should be: computed alone, by fresh kernels on pages of its own, and by the reference."""

import random
from collections import Counter

import numpy as np
import torch

from spla_backend.algorithm.reference import TokenResult, spla_token
from spla_backend.kernels import dispatch
from spla_backend.kernels.interface import Layer, Limits, PagedAttention, Step

from .settings import NUM_HEADS, NUM_KV_HEADS
from .tokens import Hashes, Vectors
from .worker import Computed
from .world import World, WrongAnswer

# Of a head's output, relative to its length: of its own dtype's rounding, and of the two RMSNorms' before it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


class Alone:
    """Kernels, pages and states that one sequence has for itself.

    Attributes:
        worst: The largest relative errors, against the sequence alone and against the reference.
    """

    def __init__(self, world: World, vectors: Vectors, counts: Counter[str]) -> None:
        settings, self.world, self.vectors, self.counts = world.settings, world, vectors, counts
        self.tolerance = TOLERANCE[world.dtype]
        self.worst: Counter[str] = Counter()
        self.ops = [self._op(index) for index in range(settings.num_layers)]
        # The longest sequence, and drafts behind it.
        pages = -(-(settings.max_model_len + settings.num_drafts) // settings.page_size)
        shape = world.layers[0].kv_cache.shape[1:]
        self.caches = [torch.empty(pages + world.num_state_blocks, *shape, dtype=world.dtype) for _ in self.ops]
        blocks = torch.arange(len(self.caches[0]), dtype=torch.int32).flip(0)[None]
        self.state_table, self.page_table = (t.contiguous() for t in blocks.split([world.num_state_blocks, pages], 1))

    def _op(self, index: int) -> PagedAttention:
        impl, settings = self.world.layers[index].impl, self.world.settings
        params = impl.options.parameters(settings.page_size, index)
        size = settings.head_size
        layer = Layer(NUM_HEADS, NUM_KV_HEADS, size, self.world.dtype, size**-0.5)
        limits = Limits(
            max_num_rows=1,
            max_query_len=1,
            max_model_len=settings.max_model_len,
            max_num_tokens=settings.max_model_len,
            prefill_dense_below=impl.options.prefill_dense_below or 0,
            largest_budget=0,
        )
        return dispatch.make(torch.device("cpu"), params, layer, limits, dense=impl.is_dense)

    def check(self, computed: Computed, draw: random.Random) -> None:
        """Compare what steps computed with the sequence alone, and a token of it with the reference.

        Raises:
            WrongAnswer: Something differs by more than rounding.
        """
        for index in range(len(self.ops)):
            one = self._layer(computed, index)
            for as_prompt in (False, True):
                chosen = np.flatnonzero(computed.as_prompt == as_prompt)
                if len(chosen):
                    one.compare(chosen, as_prompt)
            below = self.world.layers[index].impl.options.prefill_dense_below or 0
            sparse = np.flatnonzero(~computed.as_prompt | (computed.positions >= below))
            if len(sparse) and draw.random() < 0.5:
                one.compare_with_reference(int(draw.choice(sparse)))

    def excuse(self, computed: Computed, wrong: torch.Tensor) -> None:
        """Outputs of the first layer that are not what they should be `[n, H]`.

        Raises:
            WrongAnswer: One of them is not right for a query that differs by rounding, either.
        """
        if bool(wrong.any()):
            one = self._layer(computed, 0)
            for i, head in wrong.nonzero().tolist():
                if not one.is_near_tie(i, head):
                    raise WrongAnswer(f"{one.name(i, head)}: {one.error_of(i, head):.1e} from the reference")

    def _layer(self, computed: Computed, index: int) -> "_Layer":
        hashes = Hashes()
        hashes.extend(computed.tokens)
        query, key, value = self.vectors.of(hashes[: len(hashes)], index)
        self._fill(index, key, value)
        return _Layer(self, computed, index, query, key, value)

    def _fill(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        cache = self.caches[index].fill_(torch.nan)
        positions, size = torch.arange(len(key)), self.world.settings.page_size
        slots = self.page_table[0, positions // size].long() * size + positions % size
        self.ops[index].update_cache(key, value, cache, slots)


class _Layer:
    """One layer of one sequence, whose keys and values are in the cache."""

    def __init__(
        self,
        alone: Alone,
        computed: Computed,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        self.alone, self.computed, self.index = alone, computed, index
        self.op, self.cache = alone.ops[index], alone.caches[index]
        self.query, self.key, self.value = query, key, value

    def run(self, as_prompt: bool) -> torch.Tensor:
        """Outputs `[n, H, d]` of all computed positions and those between, in one row."""
        first, length, alone = int(self.computed.positions[0]), len(self.query), self.alone
        starts, lens = torch.tensor([0, length - first], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
        step = Step.of(starts, lens, alone.page_table, decode_query_len=0 if as_prompt else length)
        states = (self.cache, alone.state_table) if alone.world.num_state_blocks else (None, None)
        out = torch.full_like(self.query[first:], torch.nan)
        self.op.run(self.op.plan(step), self.query[first:], self.cache, *states, out)
        return out[torch.from_numpy(self.computed.positions - first)]

    def compare(self, chosen: np.ndarray, as_prompt: bool) -> None:
        """Outputs of the `chosen` ones among the computed positions with those of the sequence alone."""
        positions, of_chosen = self.computed.positions[chosen], torch.from_numpy(chosen)
        got, expected = self.computed.outputs[of_chosen, self.index], self.run(as_prompt)[of_chosen]
        equal = (got == expected).all(-1)
        counts = self.alone.counts
        counts["outputs_compared"] += equal.numel()
        counts["outputs_beyond_the_budget"] += int((positions >= self.op.params.budget_tokens).sum()) * NUM_HEADS
        counts["outputs_bit_equal"] += int(equal.sum())
        error = self._error(got, expected)  # [n, H]
        if self.op.params.residual == "none":
            # No state whose sum depends on steps, and no kernel for many tokens: the very same numbers.
            exact = torch.from_numpy(positions >= self.op.prefill_dense_below)
            counts["outputs_that_must_be_bit_equal"] += int(exact.sum()) * NUM_HEADS
            error[exact] = torch.where(equal[exact], error[exact], torch.inf)
        wrong = ~(error < self.alone.tolerance)
        for n, head in wrong.nonzero().tolist():
            if not self.is_near_tie(int(chosen[n]), head):
                raise WrongAnswer(f"{self.name(int(chosen[n]), head)}: {error[n, head]:.1e} from what it is alone")
        self._note("alone", error[~wrong])

    def compare_with_reference(self, i: int) -> None:
        """The computed position number `i` with the float64 reference."""
        error = self._error(self.computed.outputs[i, self.index], self._reference(i).output)
        self.alone.counts["outputs_against_reference"] += len(error)
        wrong = ~(error < self.alone.tolerance)
        for head in wrong.nonzero().flatten().tolist():
            if not self.is_near_tie(i, head):
                raise WrongAnswer(f"{self.name(i, head)}: {error[head]:.1e} from the reference")
        self._note("reference", error[~wrong])

    def _reference(self, i: int, noise: torch.Tensor | float = 0.0) -> TokenResult:
        """On statistics as they are stored, in which keys are rounded."""
        position, size = int(self.computed.positions[i]), self.op.page_layout.page_size
        pages = self.cache[self.alone.page_table[0, : position // size].long()]
        return spla_token(
            self.query[position].double() * self.query.shape[-1] ** -0.5 * (1 + noise),
            self.key[: position + 1].double(),
            self.value[: position + 1].double(),
            self.op.params,
            statistics=self.op.page_layout.statistics(pages).transpose(1, 2).flatten(0, 1).double(),
        )

    def is_near_tie(self, i: int, head: int) -> bool:
        """Whether the output is right for a query that differs by rounding: it selects other blocks, whose scores
        float32 cannot tell from those of the first."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(24):
            noise = 1e-5 * torch.randn(self.query.shape[1:], generator=generator, dtype=torch.float64)
            other = self._reference(i, noise).output[head]
            if float(self._error(self.computed.outputs[i, self.index, head], other)) < self.alone.tolerance + 1e-4:
                self.alone.counts["near_ties"] += 1
                return True
        return False

    def error_of(self, i: int, head: int) -> float:
        """Of the computed position number `i`, against the reference."""
        return float(self._error(self.computed.outputs[i, self.index, head], self._reference(i).output[head]))

    @staticmethod
    def _error(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        return (got.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)

    def name(self, i: int, head: int) -> str:
        done = self.computed
        return (
            f"{done.name}, layer {self.index}, head {head}, position {done.positions[i]} of {len(done.tokens)} tokens, "
            f"computed in step {done.steps[i]}"
        )

    def _note(self, what: str, error: torch.Tensor) -> None:
        if error.numel():
            self.alone.worst[what] = max(self.alone.worst[what], float(error.max()))
