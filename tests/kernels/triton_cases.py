"""Batches over a paged cache for the tests of the Triton kernels, and what the float64 reference says of them."""

from dataclasses import dataclass

import torch

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.reference import TokenResult, select_blocks, spla_token
from spla_backend.algorithm.selectors import get_selector
from spla_backend.algorithm.two_level import coarse_parameters
from spla_backend.kernels.cpu.vectorised import VectorisedAttention
from spla_backend.kernels.gpu.decode.steps import DecodeSteps
from spla_backend.kernels.gpu.decode.tuning import Tuning
from spla_backend.kernels.gpu.layer import GpuLayer
from spla_backend.kernels.gpu.selectors import gpu_selector_names
from spla_backend.kernels.gpu.store import Store
from spla_backend.kernels.interface import Layer, Limits

SELECTORS = gpu_selector_names()


def sinks_of(layer: GpuLayer) -> torch.Tensor | None:
    """A layer's sinks as the reference takes them."""
    return None if layer.sinks is None else layer.sinks.detach().double().cpu()


def draw_sinks(num_heads: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Sinks from next to nothing of a head's mass to most of it, one of them of none."""
    sinks = 2 + 3 * torch.randn(num_heads, generator=torch.Generator().manual_seed(seed))
    sinks[seed % num_heads] = float("-inf")
    return sinks.to(dtype)


def residual_of(selector: str, residual: str = "regression") -> str:
    """`residual` where a selector has the mass that it asks for."""
    return residual if get_selector(selector).has_mass else "none"


def each_selector(*shapes: tuple) -> list[tuple]:
    """Cases `(selector, *shape)`: every selector that runs on a GPU and every shape, each at least once."""
    return [(SELECTORS[i % len(SELECTORS)], *shapes[i % len(shapes)]) for i in range(max(len(SELECTORS), len(shapes)))]


@dataclass
class Batch:
    """Rows of some lengths over one cache, everything not written NaN."""

    layer: GpuLayer
    store: Store
    op: DecodeSteps
    keys: list[torch.Tensor]  # of each row: [L, G, d]
    values: list[torch.Tensor]
    query: torch.Tensor  # [tokens, H, d]
    query_len: int  # of the longest row
    query_lens: list[int]
    lengths: list[int]
    kv_cache: torch.Tensor  # [pages, G, B + r, 2 d]
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    state_table: torch.Tensor

    def slots(self, row: int, start: int, stop: int) -> torch.Tensor:
        position = torch.arange(start, stop)
        page = self.layer.params.page_size
        return self.block_table[row].cpu()[position // page].long() * page + position % page

    def write(self, row: int, start: int, stop: int, plain: VectorisedAttention | None = None) -> None:
        """Store the tokens `start .. stop - 1` of a row, as one batch: by the kernels, or in plain torch."""
        slots = self.slots(row, start, stop).to(self.query.device)
        keys, values = self.keys[row][start:stop], self.values[row][start:stop]
        (plain or self.store).update_cache(keys, values, self.kv_cache, slots)

    def run(self, output: torch.Tensor, steady: bool = False) -> None:
        """Run the op."""
        self.op.decode(
            self.query,
            self.kv_cache,
            self.kv_cache,
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            self.state_table,
            output,
            self.query_len,
            steady,
        )

    def capture(self, output: torch.Tensor) -> torch.cuda.CUDAGraph:
        """A graph of `run` on rows that are as short as can be; the lengths, which it reads, are then as before."""
        lengths = self.seq_lens.clone()
        self.seq_lens.fill_(self.query_len)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(output)
        self.seq_lens.copy_(lengths)
        return graph

    def decode(self, steady: bool = False) -> torch.Tensor:
        """Run the op on NaN-poisoned output and scratch."""
        tokens = len(self.query)
        beyond = torch.full_like(self.query[:1], float("nan")).repeat(tokens + self.query_len * len(self.lengths), 1, 1)
        output = beyond[:tokens]
        arrivals = ("fold_arrivals", "attend_arrivals")
        for name, buffer in self.op.scratch.items():
            if name not in arrivals:
                buffer.fill_(float("nan") if buffer.is_floating_point() else -1)
        between = self.op.flashinfer
        if between is not None:
            for buffer in (between.packed, between.exact, between.lse):
                buffer.fill_(float("nan"))
            between.last_page_len.fill_(-1)
        self.run(output, steady)
        for name in arrivals:
            assert int(self.op.scratch[name].abs().sum()) == 0, name
        if between is not None:  # it was FlashInfer that attended
            heads = self.layer.num_kv_heads * int(self.query_start_loc[-1])
            assert not bool(between.lse[:heads].isnan().any())
        assert bool(beyond[tokens:].isnan().all()), "written behind the output"
        return output

    def statistics(self, row: int, num_pages: int) -> torch.Tensor:
        """Stored statistics `[num_pages * blocks_per_page, G, width]` float64."""
        pages = self.kv_cache[self.block_table[row, :num_pages].long()]
        return self.layer.page_layout.statistics(pages).transpose(1, 2).flatten(0, 1).double().cpu()

    def check(self, output: torch.Tensor, tolerance: float, rows: list[int] | None = None) -> float:
        """Compare with the reference; returns the largest relative error of a token."""
        layer, worst = self.layer, 0.0
        norm_weights = tuple(w.double().cpu() for w in layer.norm_weights)
        starts = self.query_start_loc.tolist()
        assert float(output[starts[-1] :].float().abs().sum()) == 0, "padding is not zero"
        for row in range(len(self.lengths)) if rows is None else rows:
            for t in range(starts[row + 1] - starts[row]):
                token, stop = starts[row] + t, self.lengths[row] - self.query_lens[row] + t + 1
                expected = spla_token(
                    self.query[token].double().cpu() * layer.scale,
                    self.keys[row][:stop].double().cpu(),
                    self.values[row][:stop].double().cpu(),
                    layer.params,
                    statistics=self.statistics(row, (stop - 1) // layer.params.page_size),
                    gain=layer.gain.double().cpu(),
                    norm_weights=norm_weights,
                    sinks=sinks_of(layer),
                )
                agrees = torch.ones(layer.num_heads, dtype=torch.bool)
                for head in range(layer.num_kv_heads):
                    got = self.selected(token, row, head)
                    want = expected.selected[head]
                    if got != want:
                        self._near_tie(token, row, head, got, want, expected)
                        agrees[head * layer.group : (head + 1) * layer.group] = False
                got, want = output[token].double().cpu()[agrees], expected.output[agrees]
                if want.numel():
                    error = float((got - want).norm() / want.norm())
                    assert error < tolerance, f"row {row} token {t} of length {stop}: relative error {error:.2e}"
                    worst = max(worst, error)
        return worst

    def selected(self, token: int, row: int, head: int) -> list[int]:
        """Blocks of a page table, in its order: fine blocks where selection has two levels."""
        params, table = self.layer.params, self.op.page_table
        return self._blocks(row, head, table[token, head], self.op.page_counts[token, head], params.attended_block)

    def candidates(self, token: int, row: int, head: int) -> list[int]:
        """Selection blocks among which the fine level chose."""
        table, most = self.op.scratch["candidates"], self.op.sizes.candidates
        table = table.view(-1)[: table[..., :most].numel()].view(*table.shape[:2], most)
        count = self.op.scratch["candidate_count"][token, head]
        return self._blocks(row, head, table[token, head], count, self.layer.params.selection_block)

    def _blocks(self, row: int, head: int, table: torch.Tensor, count: torch.Tensor, size: int) -> list[int]:
        """Blocks of `size` tokens by their number in the sequence."""
        per_page, kv_heads = self.layer.params.page_size // size, self.layer.num_kv_heads
        ids = table[: int(count)].cpu()
        assert bool((ids // per_page % kv_heads == head).all())
        logical = {int(page): index for index, page in enumerate(self.block_table[row].tolist())}
        return [logical[int(i) // per_page // kv_heads] * per_page + int(i) % per_page for i in ids]

    def _near_tie(
        self, token: int, row: int, head: int, got: list[int], want: list[int], expected: TokenResult
    ) -> None:
        """Selections may differ where float32 cannot tell the scores apart, and only there."""
        params = self.layer.params
        assert got == sorted(got) and (len(got) == len(want) or params.top_p), (got, want)
        scores = expected.group_scores[head]
        if params.fine_block:
            of_fine = expected.fine_scores[head]
            position = self.lengths[row] - int(self.query_start_loc[row + 1]) + token
            candidates = select_blocks(scores, position, coarse_parameters(params))
            if self.candidates(token, row, head) == candidates:
                scores = torch.full((position // params.fine_block + 1,), torch.nan, dtype=torch.float64)
                scores[list(of_fine)] = torch.stack(list(of_fine.values()))
            else:  # whatever the fine level made of it
                got, want = self.candidates(token, row, head), candidates
                assert got == sorted(got) and len(got) == len(want), (got, want)
        differing = sorted(set(got) ^ set(want))
        gap = float(scores[differing].max() - scores[differing].min())
        assert gap < 1e-3, f"selected {got}, expected {want}: scores differ by {gap}"


def limits(
    max_num_rows: int, max_model_len: int, max_query_len: int = 1, *, max_num_tokens: int = 1, dense_below: int = 0
) -> Limits:
    """Of a layer that shares its scratch with none of another budget."""
    return Limits(max_num_rows, max_query_len, max_model_len, max_num_tokens, dense_below, largest_budget=0)


def make_batch(
    params: SplaParameters,
    lengths: list[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype = torch.float16,
    query_len: int | list[int] = 1,
    device: str = "cpu",
    seed: int = 0,
    max_model_len: int = 0,
    gain: torch.Tensor | None = None,
    norm_weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    sinks: torch.Tensor | None = None,
    tuning: Tuning | None = None,
    token_major: bool = False,
    chunk: int = 37,
    executor: str = "spla",
    captured: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None,
    by_kernels: bool = False,
) -> Batch:
    """Random rows, written to the cache in chunks of `chunk` tokens (0: all at once).

    On a CPU, where kernels are interpreted, plain torch writes them unless they are to be written `by_kernels`: the
    same bytes, but for rounding (`test_triton_cache.py`, `test_triton_sketch.py`), in a fraction of the time.

    Keys have a mean of their own in every selection block, so that blocks differ in mass and the residual has something
    to say.
    `captured` takes their place: of each row keys and values `[length, G, d]` and queries `[query_len, H, d]`.
    Where `query_len` is one number, rows of length 0 have padding behind the tokens of the others.
    """
    query_lens = query_len if isinstance(query_len, list) else [query_len if length else 0 for length in lengths]
    num_tokens = sum(query_len) if isinstance(query_len, list) else query_len * len(lengths)
    generator = torch.Generator().manual_seed(seed)
    page, longest = params.page_size, max(max(lengths), max_model_len, 1)
    sinks = None if sinks is None else sinks.to(device)
    sizes = Layer(num_heads, num_kv_heads, head_size, dtype, head_size**-0.5, gain, norm_weights, sinks=sinks)
    layer, rows = GpuLayer(params, sizes, device), len(lengths)
    op = DecodeSteps(layer, limits(rows, longest, max(1, *query_lens)), executor=executor, tuning=tuning)
    if op.fused:
        op.fused.choosing_bytes = 0  # the reference selects, however few the rows
    width = -(-longest // page)
    num_state = max(1, layer.state_layout.num_blocks)
    ids = torch.randperm(rows * (width + num_state) + 3, generator=generator).int()
    block_table = ids[: rows * width].view(rows, width).clone()
    state_table = ids[rows * width : rows * (width + num_state)].view(rows, num_state).clone()
    shape = (len(ids), num_kv_heads, layer.page_layout.rows, 2 * head_size)
    if token_major:  # another order of the first two dimensions
        kv_cache = torch.full((shape[1], shape[0], *shape[2:]), float("nan"), dtype=dtype, device=device)
        kv_cache = kv_cache.transpose(0, 1)
    else:
        kv_cache = torch.full(shape, float("nan"), dtype=dtype, device=device)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    keys, values = [], []
    for length in lengths if captured is None else ():
        block = params.selection_block
        shift = draw(-(-max(length, 1) // block), num_kv_heads, head_size).repeat_interleave(block, 0)[:length]
        keys.append((draw(length, num_kv_heads, head_size) + 0.5 * shift).to(device, dtype))
        mixed = draw(length, num_kv_heads, head_size) + 0.5 * keys[-1].float().cpu() + shift
        values.append(mixed.to(device, dtype))
    # A token stride of its own, as a slice of a joint projection has it.
    joint = (2 * draw(num_tokens, num_heads + 2, head_size)).to(device, dtype)
    if captured is not None:
        keys = [k.to(device, dtype) for k, _, _ in captured]
        values = [v.to(device, dtype) for _, v, _ in captured]
        joint[:, :num_heads] = torch.cat([q for _, _, q in captured]).to(device, dtype)
    starts = torch.tensor([0, *query_lens]).cumsum(0)  # padded rows stand last and have no tokens
    batch = Batch(
        layer,
        Store(layer),
        op,
        keys,
        values,
        joint[:, :num_heads],
        max(1, *query_lens),
        query_lens,
        lengths,
        kv_cache,
        starts.to(device, torch.int32),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table.to(device),
        state_table.to(device),
    )
    plain = None if by_kernels or device != "cpu" else VectorisedAttention(params, sizes)
    for row, length in enumerate(lengths):
        for start in range(0, length, chunk or max(length, 1)):
            batch.write(row, start, min(length, start + (chunk or length)), plain)
    return batch
