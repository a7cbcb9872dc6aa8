"""`GpuAttention` through an engine's steps, interpreted: chunks of prompts beside decode rows, in pages and state
blocks that other requests have used, in one layer or in several that differ in their budgets, with drafts to verify or
without. Every token that selects and is no rejected draft is compared with the float64 reference."""

import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.reference import candidate_voters_of, complete_statistics, spla_token, voters_of
from spla_backend.kernels.gpu import attention
from spla_backend.kernels.gpu.attention import GpuAttention
from spla_backend.kernels.interface import Layer, Limits, Pool, Step

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 32
SCALE = HEAD_SIZE**-0.5
DTYPE = torch.float16


@dataclass
class Request:
    """A prompt and what is generated behind it, all of it known in advance."""

    prompt: int
    query: torch.Tensor  # [tokens, H, d]
    key: torch.Tensor  # [tokens, G, d]
    value: torch.Tensor
    pages: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    computed: int = 0


def draw(prompt: int, generated: int, block: int) -> Request:
    length = prompt + generated
    shift = torch.randn(length // block + 1, KV_HEADS, HEAD_SIZE).repeat_interleave(block, 0)[:length]
    key = torch.randn(length, KV_HEADS, HEAD_SIZE) + 0.5 * shift
    value = torch.randn(length, KV_HEADS, HEAD_SIZE) + 0.5 * key + shift
    query = 2 * torch.randn(length, HEADS, HEAD_SIZE)
    return Request(prompt, query.to(DTYPE), key.to(DTYPE), value.to(DTYPE))


class Engine:
    """Schedules as vLLM does: running requests first, a budget of tokens a step; decode rows stand before others.

    Every layer gets the same queries, keys and values, and has a cache of its own. A generated token has up to `drafts`
    drafts behind it, as many as fit into the sequence and the step; some are rejected, and were other tokens.
    """

    def __init__(
        self,
        layers: list[SplaParameters],
        monkeypatch: pytest.MonkeyPatch,
        *,
        dense_below: int,
        tokens: int,
        rows: int,
        drafts: int = 0,
        scratch_pool: Pool = nullcontext,
    ) -> None:
        self.tokens, self.rows, self.drafts, self.page_size = tokens, rows, drafts, layers[0].page_size
        limits = Limits(
            max_num_rows=rows,
            max_query_len=1 + drafts,
            max_model_len=256,
            max_num_tokens=tokens,
            prefill_dense_below=dense_below,
            largest_budget=max(params.budget_blocks for params in layers),
        )
        layer = Layer(HEADS, KV_HEADS, HEAD_SIZE, DTYPE, SCALE)
        device = torch.device("cpu")
        self.ops = [GpuAttention(params, layer, limits, device, scratch_pool=scratch_pool) for params in layers]
        monkeypatch.setattr(attention, "attend_densely", self._attend_densely)
        for op in self.ops:
            monkeypatch.setattr(op.steps, "decode", partial(self._decode, op.steps.decode))
        self.num_states = self.ops[0].state_layout.num_blocks
        num_pages = rows * (256 // self.page_size + self.num_states)
        shape = (num_pages, KV_HEADS, self.ops[0].page_layout.rows, 2 * HEAD_SIZE)
        self.caches = [torch.full(shape, float("nan"), dtype=DTYPE) for _ in layers]
        self.free = random.sample(range(num_pages), num_pages)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.differing = self.compared = self.steady = self.unequal = 0

    def step(self) -> None:
        left, work = self.tokens, []
        while self.waiting and len(self.running) < self.rows:
            request = self.waiting.pop(0)
            request.states = [self.free.pop() for _ in range(self.num_states)]
            self.running.append(request)
        for request in self.running:
            known = max(request.prompt, request.computed + 1)  # what was generated so far
            drafts = min(self.drafts, len(request.query) - known) if known > request.prompt else 0
            count = min(known + drafts - request.computed, left)
            if count:
                work.append((request, count))
                left -= count
        work.sort(key=lambda item: item[1] > 1 + self.drafts)
        num_decodes = sum(count <= 1 + self.drafts for _, count in work)
        self.unequal += len({count for _, count in work[:num_decodes]}) > 1
        # How many tokens of a row are right: of drafts, perhaps not all.
        right = [count if r.computed < r.prompt else random.randint(1, count) for r, count in work]
        page = self.page_size
        for request, count in work:
            while len(request.pages) * page < request.computed + count:
                request.pages.append(self.free.pop())
        starts = torch.tensor([0, *(count for _, count in work)]).cumsum(0).int()
        lengths = torch.tensor([request.computed + count for request, count in work]).int()
        tables = torch.zeros(len(work), 256 // page, dtype=torch.int32)
        for row, (request, _) in enumerate(work):
            tables[row, : len(request.pages)] = torch.tensor(request.pages)
        states = torch.tensor([request.states for request, _ in work]).int()

        def of(name: str) -> torch.Tensor:
            return torch.cat([getattr(r, name)[r.computed : r.computed + count] for r, count in work])

        position = torch.cat([torch.arange(r.computed, r.computed + count) for r, count in work])
        rows = torch.arange(len(work)).repeat_interleave(starts.diff())
        slots = tables[rows, position // page] * page + position % page
        query = of("query")
        self.only_decodes = num_decodes == len(work)
        step = Step.of(starts, lengths, tables, 1 + self.drafts)
        assert step.num_decodes == num_decodes
        plans = {op.plan_key: op.plan(step) for op in self.ops}
        self.num_plans = len(plans)
        wrong = torch.cat([torch.arange(count) >= n for (_, count), n in zip(work, right, strict=True)])
        key, value = (of(name) + 3 * wrong[:, None, None] for name in ("key", "value"))
        for op, cache in zip(self.ops, self.caches, strict=True):
            op.update_cache(key, value, cache, slots)
            output = torch.full_like(query, float("nan"))
            op.run(plans[op.plan_key], query, cache, cache, states, output)
            for row, (request, _) in enumerate(work):
                sparse = None
                if row >= num_decodes:
                    sparse = range(max(request.computed, op.prefill_dense_below), request.computed + right[row])
                for position in range(request.computed, request.computed + right[row]):
                    if sparse is None or position in sparse:
                        at = int(starts[row]) + position - request.computed
                        self._check(op, cache, request, position, output[at], sparse)
            assert not bool(output.isnan().any())
        for (request, _), count in zip(work, right, strict=True):
            request.computed += count
            if request.computed == len(request.query):
                self.running.remove(request)
                self.free = [*request.pages, *request.states, *self.free]  # used again at once

    def _decode(self, decode, *arguments, steady: bool) -> None:
        assert steady == self.only_decodes  # statistics may be read early where no prompt writes any
        self.steady += steady
        decode(*arguments, steady=steady)

    def _attend_densely(self, layer, rows, query, kv_cache, block_table, output) -> None:
        for index, seq_len in enumerate(rows.seq_lens.tolist()):
            start, stop = (rows.first_token + x for x in rows.start_loc[index : index + 2].tolist())
            pages = kv_cache[block_table[rows.first_row + index].long(), :, : self.page_size]
            kv = pages.transpose(1, 2).flatten(0, 1)[:seq_len].float().repeat_interleave(HEADS // KV_HEADS, 1)
            keys, values = kv.transpose(0, 1).split(HEAD_SIZE, -1)  # [H, tokens, d]
            later = torch.arange(seq_len) > torch.arange(seq_len - (stop - start), seq_len)[:, None]
            logits = query[start:stop].float().transpose(0, 1) @ keys.mT * SCALE
            weights = logits.masked_fill(later, -torch.inf).softmax(-1)  # [H, queries, tokens]
            output[start:stop] = (weights @ values).transpose(0, 1).to(DTYPE)

    def _check(
        self,
        op: GpuAttention,
        cache: torch.Tensor,
        request: Request,
        position: int,
        output: torch.Tensor,
        sparse: range | None,
    ) -> None:
        """A token's output; `sparse` has the prompt tokens that select in this step, None for a decode row."""
        stop, params, shared = position + 1, op.layer.params, {}
        if sparse is not None:
            params = op.passes.params
            shared = {
                name: request.query[voters(position, sparse, params)].double() * SCALE
                for name, voters in (("tile_queries", voters_of), ("candidate_queries", candidate_voters_of))
            }
        complete = position // self.page_size
        stored = op.page_layout.statistics(cache[request.pages[:complete]]).transpose(1, 2).flatten(0, 1)
        expected = spla_token(
            request.query[position].double() * SCALE, request.key[:stop].double(), request.value[:stop].double(),
            params, statistics=stored.double(), **shared,
        )  # fmt: skip
        if stop == len(request.query):  # statistics are those of the keys, however they came into the pages
            fresh = complete_statistics(request.key[:stop].double(), params)
            torch.testing.assert_close(stored.double(), fresh, rtol=1e-3, atol=1e-5)
        error = float((output.double() - expected.output).norm() / expected.output.norm())
        self.compared += 1
        self.differing += error > 3e-3  # two blocks that float32 cannot tell apart may change places


@pytest.mark.parametrize(
    "kind",
    [(32, 16, "km2-rem", 1 << 20), (32, 16, "km2-rem", 0), (16, 16, "rem", 1 << 20)],
    ids=["km2-2-a-page", "km2-2-a-page-sparse", "rem-1-a-page"],
)
def test_chunks_beside_decode_rows(kind: tuple[int, int, str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    page, block, selector, dense_below = kind
    torch.manual_seed(random.randrange(1 << 30))
    engine = Engine(
        [SplaParameters(page, block, 5, selector=selector)], monkeypatch, dense_below=dense_below, tokens=37, rows=3
    )
    engine.waiting = [draw(*lengths, block) for lengths in [(3, 3), (95, 4), (110, 4), (64, 3)]]
    while engine.waiting or engine.running:
        engine.step()
    assert engine.compared >= 10 and engine.steady > 0
    assert engine.differing <= 1


def test_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of unequal numbers of drafts, beside each other and beside prompts, up to the last token of a sequence."""
    torch.manual_seed(random.randrange(1 << 30))
    engine = Engine([SplaParameters(16, 16, 5)], monkeypatch, dense_below=1 << 20, tokens=40, rows=4, drafts=4)
    engine.waiting = [draw(*lengths, 16) for lengths in [(84, 14), (90, 9), (3, 12), (85, 5), (42, 4)]]
    while engine.waiting or engine.running:
        engine.step()
    assert engine.compared >= 40 and engine.steady > 0 and engine.unequal > 2
    assert engine.differing <= 2


@pytest.mark.parametrize(("dense_below", "num_plans"), [(0, 2), (96, 1)])
def test_layers_of_several_budgets(dense_below: int, num_plans: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share scratch that is laid out for the largest, and plans where the same prompt tokens select."""
    torch.manual_seed(random.randrange(1 << 30))
    layers = [SplaParameters(16, 16, n) for n in (6, 4)]
    engine = Engine(layers, monkeypatch, dense_below=dense_below, tokens=100, rows=2)
    for layer in engine.ops[1:]:
        assert layer.steps.scratch is engine.ops[0].steps.scratch
        assert layer.passes.scratch is engine.ops[0].passes.scratch
    engine.waiting = [draw(*lengths, 16) for lengths in [(101, 2), (70, 2)]]
    while engine.waiting or engine.running:
        engine.step()
        assert engine.num_plans == num_plans
    assert engine.compared >= 12 and engine.steady > 0
    assert engine.differing <= 2


@pytest.mark.parametrize(("page", "dense_below"), [(32, 256), (16, 128)], ids=["dense-prompts", "sparse-prompts"])
def test_two_levels_of_several_budgets(page: int, dense_below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch is laid out for the candidates of the largest budget, and so are the passes, which layers share."""
    torch.manual_seed(random.randrange(1 << 30))
    layers = [SplaParameters(page, page, n, fine_block=16) for n in (4, 3)]
    engine = Engine(layers, monkeypatch, dense_below=dense_below, tokens=100, rows=2)
    assert engine.ops[1].steps.scratch is engine.ops[0].steps.scratch
    assert engine.ops[1].passes.scratch is engine.ops[0].passes.scratch
    engine.waiting = [draw(*lengths, page) for lengths in [(231, 2), (140, 2)]]
    while engine.waiting or engine.running:
        engine.step()
        assert engine.num_plans == 1
    assert engine.compared >= 8 and engine.steady > 0
    assert engine.differing <= 2
