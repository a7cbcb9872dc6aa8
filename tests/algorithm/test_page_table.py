"""Page tables read by a plain reader of FlashInfer's paged format against the tokens that the reference selects.

The reader knows the format and nothing of SPLA: `indptr`, `indices`, `last_page_len`, over a cache whose pages hold one
kv head each. Every cached token is a distinct number, so that reading a wrong head, page, block or offset shows.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from spla_backend.algorithm import reference as ref
from spla_backend.algorithm.page_table import SparsePageTable, fill_page_table, pad_slots, plan_page_table
from spla_backend.algorithm.parameters import SplaParameters

torch.set_num_threads(1)

GROUP, HEAD_SIZE = 2, 8
Blocks = int | tuple[int, int]
SHAPES = [
    # page, selection block or (selection block, fine block), kv heads, lengths
    pytest.param(16, 16, 1, [130], id="B16-b16-G1-1row"),
    pytest.param(16, 16, 3, [130, 1, 128, 16, 17, 300], id="B16-b16-G3-6rows"),
    pytest.param(64, 16, 2, [260, 256, 257, 64, 65, 400], id="B64-b16-G2-6rows"),
    pytest.param(64, 32, 2, [5, 331, 128], id="B64-b32-G2-3rows"),
    pytest.param(96, 32, 4, [480, 481, 500], id="B96-b32-G4-3rows"),
    pytest.param(32, (32, 8), 2, [330, 65, 96, 97, 289, 8, 128], id="B32-b32-f8-G2-7rows"),
    pytest.param(64, (32, 16), 3, [400, 401, 130], id="B64-b32-f16-G3-3rows"),
]


@dataclass
class Batch:
    """Rows of one query token, and what the reference selects for them."""

    params: SplaParameters
    kv_heads: int
    lengths: list[int]
    block_table: Tensor  # [rows, pages] int32
    cache: Tensor  # [num_pages, kv_heads, page_size] int64: `token_name` of the token in a slot, -1 for none
    results: list[ref.TokenResult]
    q: list[Tensor]  # of each row, [H, d]
    k: list[Tensor]  # of each row, [L, G, d]
    v: list[Tensor]

    @property
    def positions(self) -> Tensor:
        return torch.tensor(self.lengths) - 1

    def selected(self) -> Tensor:
        """`[rows, kv_heads, num_blocks]` bool over the blocks of complete pages."""
        pages = (self.positions // self.params.page_size).tolist()
        per_page = self.params.page_size // self.params.attended_block
        chosen = torch.zeros(len(pages), self.kv_heads, max(pages) * per_page, dtype=torch.bool)
        for row, result in enumerate(self.results):
            for head, blocks in enumerate(result.selected):
                complete = [block for block in blocks if block < pages[row] * per_page]
                chosen[row, head, complete] = True
        return chosen

    def table(self) -> SparsePageTable:
        plan = plan_page_table(self.block_table, self.positions, self.kv_heads, self.params)
        return fill_page_table(plan, self.selected())


def token_name(row: int, head: int, position: int) -> int:
    return (row * 100 + head) * 10_000 + position


def make_batch(page: int, blocks: Blocks, kv_heads: int, lengths: list[int], top_p: float | None = None) -> Batch:
    block, fine = (blocks, 0) if isinstance(blocks, int) else blocks
    params = SplaParameters(
        page,
        block,
        max(4, page // block + 2),
        fine_block=fine,
        residual="none",
        top_p=top_p,
    )
    gen = torch.Generator().manual_seed(page + block + kv_heads)
    num_pages = [-(-length // page) for length in lengths]
    # Rows whose tables end early are followed by ids that belong to others.
    pages = torch.randperm(sum(num_pages) + 3, generator=gen)
    block_table = torch.randint(len(pages), (len(lengths), max(num_pages) + 2), generator=gen).to(torch.int32)
    batch = Batch(params, kv_heads, lengths, block_table, torch.full((len(pages), kv_heads, page), -1), [], [], [], [])
    for row, length in enumerate(lengths):
        own = pages[sum(num_pages[:row]) : sum(num_pages[: row + 1])]
        block_table[row, : len(own)] = own.to(torch.int32)
        for position in range(length):
            for head in range(kv_heads):
                batch.cache[own[position // page], head, position % page] = token_name(row, head, position)
        batch.q.append(torch.randn(kv_heads * GROUP, HEAD_SIZE, generator=gen, dtype=torch.float64))
        batch.k.append(torch.randn(length, kv_heads, HEAD_SIZE, generator=gen, dtype=torch.float64))
        batch.v.append(torch.randn(length, kv_heads, HEAD_SIZE, generator=gen, dtype=torch.float64))
        batch.results.append(ref.spla_token(batch.q[row], batch.k[row], batch.v[row], params))
    return batch


def read_flashinfer(table: SparsePageTable, request: int, pages: Tensor) -> list[int]:
    """Tokens of a request, in order: all of each page but the last, `last_page_len` of that. `pages` `[ids, size]`."""
    begin, end = int(table.indptr[request]), int(table.indptr[request + 1])
    ids = table.indices[begin:end].tolist()
    tokens: list[int] = []
    for page in ids[:-1]:
        tokens += pages[page].tolist()
    return tokens + pages[ids[-1]][: int(table.last_page_len[request])].tolist()


@pytest.mark.parametrize("top_p", [None, 0.4], ids=["budget", "top_p"])
@pytest.mark.parametrize(("page", "block", "kv_heads", "lengths"), SHAPES)
def test_reads_what_the_reference_selects(
    page: int, block: Blocks, kv_heads: int, lengths: list[int], top_p: float | None
) -> None:
    batch = make_batch(page, block, kv_heads, lengths, top_p)
    table, size = batch.table(), batch.params.attended_block
    assert table.indptr.dtype == table.indices.dtype == table.last_page_len.dtype == torch.int32
    assert table.indptr.shape == (len(lengths) * kv_heads + 1,)
    assert table.last_page_len.shape == (len(lengths) * kv_heads,)
    assert int(table.indptr[0]) == 0
    assert int(table.indptr[-1]) == len(table.indices)
    left_out = 0
    for row, length in enumerate(lengths):
        for head in range(kv_heads):
            want = ref.tokens_of(batch.results[row].selected[head], length, size)
            got = read_flashinfer(table, row * kv_heads + head, batch.cache.reshape(-1, size))
            assert got == [token_name(row, head, position) for position in want]
            left_out += length - len(want)
    assert left_out > 0, "the example must leave something out"


def test_whole_pages_are_numbered_page_times_heads_plus_head() -> None:
    """With blocks as large as pages, the ids index FlashInfer's `[num_pages * G, 1, B, d]` view of the cache."""
    batch = make_batch(16, 16, 3, [130, 40])
    table = batch.table()
    for row in (0, 1):
        for head in range(3):
            begin, end = table.indptr[row * 3 + head : row * 3 + head + 2].tolist()
            want = [int(batch.block_table[row, i]) * 3 + head for i in batch.results[row].selected[head]]
            assert table.indices[begin:end].tolist() == want


@pytest.mark.parametrize(("page", "block", "kv_heads", "lengths"), SHAPES)
def test_attention_over_the_table_is_the_exact_part(
    page: int, block: Blocks, kv_heads: int, lengths: list[int]
) -> None:
    batch = make_batch(page, block, kv_heads, lengths)
    table, size = batch.table(), batch.params.attended_block
    for row in range(len(lengths)):
        for head in range(kv_heads):
            names = read_flashinfer(table, row * kv_heads + head, batch.cache.reshape(-1, size))
            positions = [name % 10_000 for name in names]
            for h in range(head * GROUP, (head + 1) * GROUP):
                logits = batch.k[row][positions, head] @ batch.q[row][h]
                want = batch.results[row].exact[h]
                torch.testing.assert_close(logits.softmax(0) @ batch.v[row][positions, head], want)
                torch.testing.assert_close(logits.logsumexp(0), batch.results[row].lse[h])


@pytest.mark.parametrize(("page", "block", "kv_heads", "lengths"), SHAPES)
def test_offsets_depend_on_lengths_alone(page: int, block: Blocks, kv_heads: int, lengths: list[int]) -> None:
    """With a budget in blocks FlashInfer is planned once a step: another selection changes `indices` and no more."""
    batch = make_batch(page, block, kv_heads, lengths)
    one = batch.table()
    batch.results = [ref.spla_token(-batch.q[i], batch.k[i], batch.v[i], batch.params) for i in range(len(lengths))]
    other = batch.table()
    assert torch.equal(one.indptr, other.indptr)
    assert torch.equal(one.last_page_len, other.last_page_len)
    assert not torch.equal(one.indices, other.indices)


@pytest.mark.parametrize("top_p", [None, 0.4], ids=["budget", "top_p"])
@pytest.mark.parametrize(("page", "block", "kv_heads", "lengths"), SHAPES)
def test_padded_slots_read_the_same_tokens(
    page: int, block: Blocks, kv_heads: int, lengths: list[int], top_p: float | None
) -> None:
    batch = make_batch(page, block, kv_heads, lengths, top_p)
    table, size = batch.table(), batch.params.attended_block
    num_complete = batch.positions // page * (page // size)
    num_current = (batch.positions // size + 1 - num_complete).repeat_interleave(kv_heads)
    slots = pad_slots(table.indptr, table.last_page_len, num_current, size)
    tokens = batch.cache.reshape(-1, size)[table.indices.long()[slots.where]]  # [requests, slots, block]
    for row, length in enumerate(lengths):
        for head in range(kv_heads):
            request = row * kv_heads + head
            blocks = batch.results[row].selected[head]
            want = [token_name(row, head, t) for t in ref.tokens_of(blocks, length, size)]
            assert tokens[request][slots.visible[request]].tolist() == want
            complete = [i for i, b in enumerate(blocks) if b < int(num_complete[row])]
            assert slots.complete[request].nonzero().flatten().tolist() == complete
