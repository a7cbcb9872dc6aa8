"""`CudaPagedSpla` through an engine's steps, interpreted: chunks of prompts beside decode rows, in pages and state
blocks that other requests have used. Every token that selects is compared with the float64 reference."""

import random
from dataclasses import dataclass, field

import pytest
import torch

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.reference import complete_statistics, spla_token
from spla_backend.kernels.cuda import CudaPagedSpla

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
    """Schedules as vLLM does: running requests first, a budget of tokens a step; decode rows stand before others."""

    def __init__(
        self, params: SplaParameters, monkeypatch: pytest.MonkeyPatch, *, dense_below: int, tokens: int, rows: int
    ) -> None:
        self.params, self.tokens, self.rows = params, tokens, rows
        self.op = CudaPagedSpla(
            params, max_num_tokens=tokens, prefill_dense_below=dense_below, num_heads=HEADS, num_kv_heads=KV_HEADS,
            head_size=HEAD_SIZE, cache_dtype=DTYPE, scale=SCALE, max_num_rows=rows, max_model_len=256, device="cpu",
        )  # fmt: skip
        monkeypatch.setattr(self.op, "_attend_densely", self._attend_densely)
        decode = self.op._decode.decode

        def checked(*arguments, steady: bool) -> None:
            assert steady == self.only_decodes  # statistics may be read early where no prompt writes any
            self.steady += steady
            decode(*arguments, steady=steady)

        monkeypatch.setattr(self.op._decode, "decode", checked)
        num_pages = rows * (256 // params.page_size + self.op.state_layout.num_blocks)
        shape = (num_pages, KV_HEADS, self.op.page_layout.rows, 2 * HEAD_SIZE)
        self.cache = torch.full(shape, float("nan"), dtype=DTYPE)
        self.free = random.sample(range(num_pages), num_pages)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.differing = self.compared = self.steady = 0

    def step(self) -> None:
        left, work = self.tokens, []
        while self.waiting and len(self.running) < self.rows:
            request = self.waiting.pop(0)
            request.states = [self.free.pop() for _ in range(self.op.state_layout.num_blocks)]
            self.running.append(request)
        for request in self.running:
            known = max(request.prompt, request.computed + 1)  # what was generated so far
            count = min(known - request.computed, left)
            if count:
                work.append((request, count))
                left -= count
        work.sort(key=lambda item: item[1] > 1)
        num_decodes = sum(count == 1 for _, count in work)
        page = self.params.page_size
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
        self.op.update_cache(
            of("key"), of("value"), self.cache, tables[rows, position // page] * page + position % page
        )
        query = of("query")
        output = torch.full_like(query, float("nan"))
        plan = self.op.plan(
            starts, lengths, tables, num_decodes=num_decodes, num_decode_tokens=num_decodes, decode_query_len=1,
            prefill_starts=starts[num_decodes:].tolist(), prefill_lens=lengths[num_decodes:].tolist(),
        )  # fmt: skip
        self.only_decodes = num_decodes == len(work)
        self.op.run(plan, query, self.cache, self.cache, states, output)
        for row, (request, count) in enumerate(work):
            for position in range(request.computed, request.computed + count):
                if row < num_decodes or position >= self.op.prefill_dense_below:
                    self._check(request, position, output[int(starts[row]) + position - request.computed])
            request.computed += count
            if request.computed == len(request.query):
                self.running.remove(request)
                self.free = [*request.pages, *request.states, *self.free]  # used again at once
        assert not bool(output.isnan().any())

    def _attend_densely(self, rows, query, kv_cache, block_table, output) -> None:
        for index, seq_len in enumerate(rows.seq_lens.tolist()):
            start, stop = (rows.first_token + x for x in rows.start_loc[index : index + 2].tolist())
            pages = kv_cache[block_table[rows.first_row + index].long(), :, : self.params.page_size]
            kv = pages.transpose(1, 2).flatten(0, 1)[:seq_len].float().repeat_interleave(HEADS // KV_HEADS, 1)
            keys, values = kv.transpose(0, 1).split(HEAD_SIZE, -1)  # [H, tokens, d]
            later = torch.arange(seq_len) > torch.arange(seq_len - (stop - start), seq_len)[:, None]
            logits = query[start:stop].float().transpose(0, 1) @ keys.mT * SCALE
            weights = logits.masked_fill(later, -torch.inf).softmax(-1)  # [H, queries, tokens]
            output[start:stop] = (weights @ values).transpose(0, 1).to(DTYPE)

    def _check(self, request: Request, position: int, output: torch.Tensor) -> None:
        stop = position + 1
        complete = position // self.params.page_size
        stored = self.op.page_layout.statistics(self.cache[request.pages[:complete]]).transpose(1, 2).flatten(0, 1)
        expected = spla_token(
            request.query[position].double() * SCALE, request.key[:stop].double(), request.value[:stop].double(),
            self.params, statistics=stored.double(),
        )  # fmt: skip
        if stop == len(request.query):  # statistics are those of the keys, however they came into the pages
            fresh = complete_statistics(request.key[:stop].double(), self.params)
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
        SplaParameters(page, block, 5, selector=selector), monkeypatch, dense_below=dense_below, tokens=37, rows=3
    )
    engine.waiting = [draw(*lengths, block) for lengths in [(3, 3), (95, 4), (110, 4), (64, 3)]]
    while engine.waiting or engine.running:
        engine.step()
    assert engine.compared >= 10 and engine.steady > 0
    assert engine.differing <= 1
