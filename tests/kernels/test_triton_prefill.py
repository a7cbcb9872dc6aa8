"""Sparse prefill against the float64 reference: outputs of tokens, whatever rows and chunks they are in."""

import random
from dataclasses import replace

import pytest
import torch
from triton_cases import SELECTORS, Batch, draw_sinks, each_selector, limits, make_batch, residual_of, sinks_of

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.reference import (
    TokenResult,
    apply_feature_map,
    candidate_voters_of,
    key_features,
    recurrent_state,
    select_blocks,
    spla_token,
    voters_of,
)
from spla_backend.algorithm.two_level import coarse_parameters
from spla_backend.kernels.gpu.layer import GpuLayer
from spla_backend.kernels.gpu.prefill.attend import address_unit
from spla_backend.kernels.gpu.prefill.passes import PrefillPasses
from spla_backend.kernels.gpu.prefill.sizes import NARROW, PrefillTuning
from spla_backend.kernels.interface import Layer
from spla_backend.kernels.layout import STATE_MAGIC

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attend(
    batch: Batch,
    ranges: list[tuple[int, int]],
    *,
    max_groups: int | None = None,
    tuning: PrefillTuning | None = None,
    seed: int = 1,
    captured: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, PrefillPasses]:
    """Prefill the positions `ranges` of the batch's rows; queries (random, or `captured [tokens, H, d]`), NaN-poisoned
    outputs, and the op.

    The keys and values of those tokens, and of no later ones, are in the cache.
    """
    layer, total = batch.layer, sum(b - a for a, b in ranges)
    longest = max(batch.lengths)
    op = PrefillPasses(layer, limits(len(ranges), longest, max_num_tokens=total), tuning=tuning)
    if max_groups is not None:
        op.planner.max_groups = max_groups
    generator = torch.Generator().manual_seed(seed)
    joint = 2 * torch.randn(total, layer.num_heads + 2, layer.head_size, generator=generator)
    query = joint.to(DEVICE, layer.cache_dtype)[:, : layer.num_heads]
    if captured is not None:
        query.copy_(captured)
    output = torch.full_like(query, float("nan"))
    starts = [0]
    for a, b in ranges:
        starts.append(starts[-1] + b - a)
    plan = op.planner.plan(0, starts, [b for _, b in ranges])
    for step in plan.passes:
        for name, buffer in op.scratch.items():
            if name != "arrivals":
                buffer.fill_(float("nan") if buffer.is_floating_point() else -1)
        op.run(step, query, batch.kv_cache, batch.kv_cache, batch.block_table, batch.state_table, output)
    assert int(op.scratch["arrivals"].abs().sum()) == 0
    return query, output, op


def check(batch: Batch, ranges: list[tuple[int, int]], tolerance: float, sample: int = 1, **arguments: object) -> None:
    """Compare every `sample`-th sparse token with the reference; dense ones must not have been touched."""
    query, output, op = attend(batch, ranges, **arguments)
    layer, params = batch.layer, op.params
    norm_weights = tuple(w.double().cpu() for w in layer.norm_weights)
    scaled = query.double().cpu() * layer.scale
    at, compared = 0, 0
    for row, (start, stop) in enumerate(ranges):
        statistics = batch.statistics(row, (stop - 1) // params.page_size)
        keys, values = batch.keys[row].double().cpu(), batch.values[row].double().cpu()
        sparse = range(max(start, op.dense_below), stop)
        for position in range(start, stop):
            token = at + position - start
            if position < op.dense_below:
                assert bool(output[token].isnan().all())
                continue
            if (position - start) % sample:
                continue
            voters = [at + p - start for p in voters_of(position, sparse, params)]
            of_candidates = [at + p - start for p in candidate_voters_of(position, sparse, params)]
            expected = spla_token(
                scaled[token],
                keys[: position + 1],
                values[: position + 1],
                params,
                tile_queries=scaled[voters],
                candidate_queries=scaled[of_candidates],
                statistics=statistics[: position // params.page_size * params.blocks_per_page],
                gain=layer.gain.double().cpu(),
                norm_weights=norm_weights,
                sinks=sinks_of(layer),
            )
            got, want = output[token].double().cpu(), expected.output
            for head in range(layer.num_kv_heads):
                heads = slice(head * layer.group, (head + 1) * layer.group)
                error = float((got[heads] - want[heads]).norm() / want[heads].norm())
                if not error < tolerance:
                    gap = near_tie(expected, head, position, params)
                    assert gap < 1e-3, f"row {row} position {position} head {head}: relative error {error:.2e}"
            compared += 1
        at += stop - start
    assert compared


def fresh() -> int:
    return random.randrange(1 << 30)


def near_tie(expected: TokenResult, head: int, position: int, params: SplaParameters) -> float:
    """How far, in either level, the best score left out is from the worst that is selected and not forced."""
    scores, selected = expected.group_scores[head], expected.selected[head]
    if not params.fine_block:
        return least_gap(scores, selected)
    fine = expected.fine_scores[head]
    order = list(fine)
    of_fine = least_gap(torch.stack([fine[i] for i in order]), [order.index(i) for i in selected if i in fine])
    return min(of_fine, least_gap(scores, select_blocks(scores, position, coarse_parameters(params))))


def least_gap(scores: torch.Tensor, selected: list[int]) -> float:
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[[block for block in selected if block < len(scores)]] = True
    if bool(mask.all()):
        return float("inf")
    best = scores[~mask].max()
    return float((scores[mask] - best).abs().min())


def in_chunks(batch: Batch, query: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """`query` `[tokens, H, d]` of row 0 from position `start` on, `size` tokens a step; NaN-poisoned outputs.

    On a GPU a layer of the same geometry goes before in each step, so that its launches are bound, and leaves a state
    that covers too much.
    """
    op = PrefillPasses(batch.layer, limits(1, max(batch.lengths), max_num_tokens=size))
    output, other = (torch.full_like(query, float("nan")) for _ in range(2))
    for first in range(0, len(query), size):
        some = slice(first, min(first + size, len(query)))
        plan = op.planner.plan(0, [0, some.stop - first], [start + some.stop])
        for step in plan.passes:
            for target in (other[some], output[some]) if DEVICE == "cuda" else (output[some],):
                op.run(
                    step, query[some], batch.kv_cache, batch.kv_cache, batch.block_table[:1], batch.state_table[:1],
                    target,
                )  # fmt: skip
    return output


def make_row(batch: Batch, row: int) -> Batch:
    """One row of a batch alone, over the same cache."""
    rows = slice(row, row + 1)
    return replace(batch, block_table=batch.block_table[rows], state_table=batch.state_table[rows])


def assert_agree(got: torch.Tensor, want: torch.Tensor, tolerance: float, group: int) -> None:
    """Heads of a token, group by group; an exchange of two pages of equal score shows in few of them."""
    got, want = (x.double().unflatten(1, (-1, group)).flatten(2) for x in (got, want))  # [tokens, G, group * d]
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert bool(error.isfinite().all())
    assert int((error >= tolerance).sum()) <= error.numel() // 500, f"relative error {float(error.max()):.2e}"


def case(
    params: SplaParameters,
    lengths: list[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 32,
    **arguments: object,
) -> Batch:
    return make_batch(
        params, lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, device=DEVICE, **arguments
    )


RESIDUALS = {
    "none": {"residual": "none"},
    "regression": {"residual": "regression"},
    "linear": {"residual": "linear"},
    "paper": {"residual": "linear", "combine": "double_rmsnorm"},
}


@pytest.mark.parametrize("residual", RESIDUALS)
def test_residuals(residual: str) -> None:
    params = SplaParameters(16, 16, 4, **RESIDUALS[residual])
    check(case(params, [107]), [(0, 107)], 3e-3, sample=3, max_groups=4)


@pytest.mark.parametrize("residual", ["none", "regression", "linear"])
@pytest.mark.parametrize("top_p", [None, 0.7], ids=["", "top-p"])
def test_sinks(residual: str, top_p: float | None) -> None:
    params = SplaParameters(16, 16, 5, residual=residual, top_p=top_p)
    gain = torch.tensor([0.0, 0.5, 1.0, 2.0])
    check(case(params, [107], sinks=draw_sinks(4, fresh()), gain=gain), [(0, 107)], 3e-3, sample=3, max_groups=4)


@pytest.mark.parametrize("selector", ["quest", "km2-rem"])
@pytest.mark.parametrize("statistics", ["auto", "fp8"])
def test_sinks_by_selector(selector: str, statistics: str) -> None:
    params = SplaParameters(32, 16, 5, selector=selector, residual=residual_of(selector), statistics_dtype=statistics)
    check(case(params, [101], sinks=draw_sinks(4, fresh())), [(90, 101)], 3e-3, sample=5)


def test_layers_share_launches_and_not_sinks() -> None:
    """Two layers of one geometry take turns in the passes of one plan; on a GPU the second time by bound launches."""
    batches = [case(SplaParameters(16, 16, 4), [107], sinks=draw_sinks(4, seed)) for seed in (1, 2)]
    (query, first, _), (_, second, _) = (attend(batch, [(80, 107)]) for batch in batches)
    assert float((first - second).norm() / first.norm()) > 0.02
    ops = [PrefillPasses(batch.layer, limits(1, 107, max_num_tokens=27)) for batch in batches]
    plan = ops[0].planner.plan(0, [0, 27], [107])
    for _ in range(2):
        for batch, op, alone in zip(batches, ops, (first, second), strict=True):
            output = torch.full_like(query, float("nan"))
            for step in plan.passes:
                large = replace(step)  # with the launches of `step`
                op.run(large, query, batch.kv_cache, batch.kv_cache, batch.block_table, batch.state_table, output)
            assert float((output - alone).norm() / alone.norm()) < 1e-3


@pytest.mark.parametrize("group", [1, 3, 8])
def test_sinks_of_groups(group: int) -> None:
    params = SplaParameters(16, 16, 6, top_p=0.8)
    sinks = draw_sinks(2 * group, fresh(), torch.float32)
    check(case(params, [115], num_heads=2 * group, head_size=64, sinks=sinks), [(92, 115)], 3e-3, sample=5)


@pytest.mark.parametrize("selector", SELECTORS)
def test_selectors(selector: str) -> None:
    params = SplaParameters(16, 16, 4, selector=selector, residual=residual_of(selector))
    check(case(params, [101]), [(78, 101)], 3e-3, sample=5)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_groups(group: int) -> None:
    params = SplaParameters(16, 16, 4)
    check(case(params, [99], num_heads=2 * group), [(76, 99)], 3e-3, sample=5)


@pytest.mark.parametrize(("page", "head_size"), [(48, 48), (64, 16), (32, 80)])
def test_pages_and_heads(page: int, head_size: int) -> None:
    params = SplaParameters(page, page, 3)
    stop = 4 * page + 13
    check(case(params, [stop], head_size=head_size), [(stop - 21, stop)], 3e-3, sample=4)


@pytest.mark.parametrize(
    ("page", "block", "more"),
    [
        (64, 16, {"selector": "km2-rem", "budget_blocks": 7}),
        (48, 16, {"residual": "linear", "budget_blocks": 5}),
        (64, 32, {"residual": "none", "budget_blocks": 3, "first_blocks": 0, "last_blocks": 1, "top_p": 0.8}),
        (32, 16, {"budget_blocks": 5, "last_blocks": 4}),
        (16, 16, {"selector": "km2-rem", "budget_blocks": 4}),
    ],
    ids=["4-a-page", "3-a-page", "2-a-page", "forced-alone", "1-a-page"],
)
def test_finer_blocks(page: int, block: int, more: dict) -> None:
    """From the first token that selects over a page's end, and through the blocks of the page from within one, in large
    and in small passes."""
    params = SplaParameters(page, block, **more)
    start = params.budget_blocks * block
    ranges = [(start, start + block + 5), (start + max(3, page - block - 3), start + page + 2)]
    check(case(params, [stop for _, stop in ranges]), ranges, 3e-3, sample=5, max_groups=3)


FP8 = {"statistics_dtype": "fp8"}


@pytest.mark.parametrize(
    ("page", "block", "fine", "heads", "more"),
    [
        (64, 64, 16, (8, 2, 32), {"budget_blocks": 3}),  # as by default
        (64, 64, 32, (2, 2, 16), {"budget_blocks": 4, "residual": "none", "sinks": True}),
        (64, 16, 16, (3, 1, 48), {"budget_blocks": 6, "selector": "km2-rem"}),
        (128, 64, 64, (8, 1, 64), {"budget_blocks": 4, "residual": "linear", "statistics_dtype": "fp8"}),
        (32, 32, 16, (4, 2, 32), {"budget_blocks": 4, "top_p": 0.8, "last_blocks": 3, "sinks": True}),
        (16, 16, 16, (4, 1, 32), {"budget_blocks": 5, "residual": "linear", "combine": "double_rmsnorm"}),
        (48, 16, 16, (4, 1, 32), {"budget_blocks": 7, "first_blocks": 0, "last_blocks": 1, "selector": "quest",
                                  "residual": "none", "sinks": True}),
    ],
    ids=["main", "fine-32", "p64-b16", "p128-b64-f64", "top-p", "p16", "p48"],
)  # fmt: skip
def test_two_levels(page: int, block: int, fine: int, heads: tuple[int, int, int], more: dict) -> None:
    """From the first token that selects on, over a page's end, and a chunk that begins and ends within a tile."""
    more = dict(more)
    sinks = draw_sinks(heads[0], fresh()) if more.pop("sinks", False) else None
    params = SplaParameters(page, block, fine_block=fine, least_candidates=2 * more["budget_blocks"] + 1, **more)
    start = params.whole_tokens
    ranges = [(start, start + page + 5), (start + 2 * page - 7, start + 2 * page + 39)]
    batch = case(
        params, [stop for _, stop in ranges], num_heads=heads[0], num_kv_heads=heads[1], head_size=heads[2], sinks=sinks
    )
    check(batch, ranges, 3e-3, sample=7, max_groups=2)


@pytest.mark.parametrize(
    ("selector", "heads", "page", "block"),
    each_selector(
        ((7, 1, 80), 48, 16),
        ((4, 2, 32), 64, 16),
        ((2, 2, 64), 16, 16),
        ((4, 2, 32), 32, 32),
        ((4, 1, 128), 64, 64),
        ((8, 2, 32), 32, 16),
        ((7, 1, 96), 16, 16),
    ),
    ids=str,
)
def test_statistics_in_fp8(selector: str, heads: tuple[int, int, int], page: int, block: int) -> None:
    params = SplaParameters(
        page, block, page // block + 3, selector=selector, residual=residual_of(selector, "linear"), **FP8
    )  # fmt: skip
    start = max(params.budget_blocks * block, 2 * page) + page - 3
    stop = start + min(page, 21)  # over the end of a page and of its first block
    batch = case(params, [stop], num_heads=heads[0], num_kv_heads=heads[1], head_size=heads[2])
    check(batch, [(start, stop)], 3e-3, sample=4, max_groups=2)


def test_regression_of_statistics_in_fp8() -> None:
    """The mean logit of what is left out is the state's, less the selected blocks' by their rounded means: of many
    blocks left out it is exact, whatever all means have in common."""
    batch = case(SplaParameters(32, 16, 5, **FP8), [420])
    batch.keys[0] += 2 * torch.randn_like(batch.keys[0][:1])
    batch.write(0, 0, 420)
    # Outputs are a third as long as values here, so that rounding counts for more: up to 4e-3 in 120 draws. With
    # rounded means in the place of the state's, it was 2e-2 to .2 in 16 draws.
    check(batch, [(408, 420)], 6e-3, sample=3)


@pytest.mark.parametrize("more", [{"fine_block": 16, "least_candidates": 4}, {}], ids=["two-levels", "one-level"])
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nothing_else_is_read(more: dict) -> None:
    """No key beyond the candidates, and no key or value of a block that no tile of a kv head selected: NaN there, once
    the state is up to date."""
    params = SplaParameters(64, 64, 3, **more)
    batch = case(params, [616])
    _, expected, op = attend(batch, [(576, 616)])  # of one page, and so one candidate tile or two tiles
    rows = batch.kv_cache.view(-1, batch.kv_cache.shape[-1])  # keys and values of a token side by side
    d = rows.shape[1] // 2
    unit = rows.shape[1] // address_unit(batch.kv_cache)
    keys, values = (torch.zeros(len(rows), dtype=torch.bool, device=rows.device) for _ in range(2))

    def mark(where: torch.Tensor, addresses: torch.Tensor, size: int) -> None:
        where[(addresses[:, None].long() // unit + torch.arange(size, device=rows.device)).flatten()] = True

    tiles = 2
    table = op.scratch["table"].flatten().view(-1, 3 * 64 // params.attended_block)
    for pair in range(2 * tiles):
        used = -(-int(op.scratch["used"][pair]) // params.attended_block)
        mark(keys, table[pair, :used], params.attended_block)
        mark(values, table[pair, :used], params.attended_block)
    for head in range(2 if params.fine_block else 0):
        mark(keys, op.scratch["candidates"][head, 1, : int(op.scratch["num"][head])], 64)
    of_tokens = torch.zeros(batch.kv_cache.shape[:3], dtype=torch.bool, device=rows.device)
    of_tokens[batch.block_table[0].long(), :, :64] = True
    of_tokens = of_tokens.flatten()
    assert int((of_tokens & ~keys).sum()) > 100 and int((of_tokens & ~values).sum()) > 400
    rows[:, :d][of_tokens & ~keys] = float("nan")
    rows[:, d:][of_tokens & ~values] = float("nan")
    _, output, _ = attend(batch, [(576, 616)])
    assert torch.equal(output, expected)


def test_top_p() -> None:
    params = SplaParameters(16, 16, 6, top_p=0.7)
    check(case(params, [173]), [(150, 173)], 3e-3, sample=2)


def test_forced_pages_alone() -> None:
    params = SplaParameters(16, 16, 4, first_blocks=2, last_blocks=2)
    check(case(params, [101]), [(78, 101)], 3e-3, sample=5)


def test_one_page_outweighs_all() -> None:
    """What the pages left out weigh is a difference of sums, here of which one page is all but everything."""
    params = SplaParameters(16, 16, 4)
    batch = case(params, [125])
    batch.keys[0][40:48] *= 12
    batch.keys[0][90:92] *= 12
    batch.write(0, 0, 125)
    check(batch, [(102, 125)], 3e-3, sample=2)


def test_rows_and_passes() -> None:
    """Rows of several lengths, cached prefixes and dense beginnings, in passes that cut rows anywhere."""
    params = SplaParameters(16, 16, 4)
    batch = case(params, [98, 40, 126, 97])
    ranges = [(33, 98), (0, 40), (110, 126), (90, 97)]
    check(batch, ranges, 3e-3, sample=4, max_groups=3)


def test_state_of_another_request() -> None:
    """Blocks that held another request's state, and blocks that hold this request's, give the same answer."""
    params = SplaParameters(16, 16, 4)
    batch, other = case(params, [114]), case(params, [114], seed=5)
    attend(other, [(100, 114)])
    blocks, foreign = batch.state_table[0].long(), other.state_table[0].long()
    batch.kv_cache[blocks] = other.kv_cache[foreign]
    check(batch, [(93, 114)], 3e-3, sample=4)
    check(batch, [(100, 114)], 3e-3, sample=4)  # its own, from the pages before


def test_passes_agree_within_rounding() -> None:
    """Tokens in one pass, and in several, large and small ones. A GPU does the same arithmetic in all passes of one
    launch shape (`test_gpu_passes_agree_bit_for_bit`); products on a CPU round by the shape of the call.

    A token's weights, its parts and its output are each rounded to float16: by 2^-11 of the largest value at most. A
    logit is a float32 sum of 32 terms, and `|q| |k| scale` below 24 here: it is off by less than a tenth of 2^-11, and
    so are numerator and denominator.
    """
    params = SplaParameters(16, 16, 4, residual="none")
    batch = case(params, [112])
    _, whole, _ = attend(batch, [(72, 112)])
    _, cut, _ = attend(batch, [(72, 112)], max_groups=2)
    largest = batch.values[0].float().abs().amax((0, 2)).repeat_interleave(2)  # [H]
    assert bool(((whole - cut).float().abs() <= 2 * 3.2 * 2**-11 * largest[:, None]).all())


@pytest.mark.parametrize(
    ("size", "more"),
    [(32, {}), (64, FP8), (32, {"fine_block": 16, "least_candidates": 9})],
    ids=["32", "64-fp8", "32-two-levels"],
)
def test_chunk_sizes_agree(size: int, more: dict) -> None:
    """Chunks that end between candidate tiles."""
    params = SplaParameters(32, 32, 4, **more)
    batch = case(params, [345])
    query, whole, _ = attend(batch, [(256, 345)])
    batch.kv_cache[batch.state_table[0].long()] = float("nan")  # as a prefix cache hit at 256 finds it
    assert_agree(in_chunks(batch, query, 256, size), whole, 1e-3, 2)


def test_rows_agree_alone() -> None:
    """Rows of a mixed batch and each of them alone."""
    params = SplaParameters(16, 16, 4)
    batch = case(params, [101, 96, 83])
    ranges = [(82, 101), (93, 96), (72, 83)]
    query, together, _ = attend(batch, ranges)
    first = 0
    for row, (start, stop) in enumerate(ranges):
        alone = make_row(batch, row)
        rows = slice(first, first + stop - start)
        got = in_chunks(alone, query[rows], start, stop - start)
        assert_agree(got, together[rows], 1e-3, 2)
        first = rows.stop


def fold(batch: Batch, lengths: list[int], splits: int | None = None) -> None:
    """Bring the states of rows that attend to everything up to date, the pages of each cut into about `splits`."""
    sizes = limits(len(lengths), 1 << 20, max_num_tokens=sum(lengths), dense_below=1 << 30)
    op = PrefillPasses(batch.layer, sizes, tuning=None if splits is None else replace(PrefillTuning(), fold_pages=1))
    if splits is not None:
        op.planner.fold_programs = splits * len(lengths) * batch.layer.num_kv_heads
        shape = splits * len(lengths), *op.scratch["partial"].shape[1:]
        op.scratch = {**op.scratch, "partial": torch.empty(shape, device=DEVICE)}
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    plan = op.planner.plan(0, starts, lengths)
    assert plan.folds is not None and not plan.passes
    assert splits in (None, 1) or plan.folds.most_splits > 1
    op.scratch["partial"].fill_(float("nan"))
    op.fold(plan.folds, batch.kv_cache, batch.kv_cache, batch.block_table, batch.state_table)
    assert int(op.scratch["arrivals"].abs().sum()) == 0


def check_states(batch: Batch, lengths: list[int]) -> None:
    """States cover every complete page, as a decode step would have left them."""
    layer, layout, size = batch.layer, batch.layer.state_layout, batch.layer.params.page_size
    words = batch.kv_cache.view(torch.int32)
    for row, length in enumerate(lengths):
        covered, blocks = length // size, batch.state_table[row].long()
        if covered == 0:
            assert bool(batch.kv_cache[blocks].isnan().all())
            continue
        last = int(batch.block_table[row, covered - 1])
        for ordinal, block in enumerate(blocks.tolist()):
            for head in range(layer.num_kv_heads):
                stamp = words[last, head].flatten()[-4:].tolist()
                assert words[block, head, 0, :8].tolist() == [STATE_MAGIC, covered, *stamp, ordinal, 0]
        body = batch.kv_cache[blocks].view(torch.float32)[:, :, 1 : layout.rows_per_block].transpose(0, 1).flatten(1, 2)
        for head in range(layer.num_kv_heads):
            keys, values = (x[row][: covered * size, head].double().cpu() for x in (batch.keys, batch.values))
            linear = layer.params.residual == "linear"
            features = apply_feature_map("softmax", keys) if linear else key_features(keys, layer.params)
            s, z = recurrent_state(features, values)
            got = body[head].double().cpu()
            for what, want in ((got[: layout.s_rows], s), (got[layout.s_rows].flatten(), z[: layout.z_size])):
                error = float((what - want).norm() / want.norm())
                # Features of `linear` are rounded to the cache dtype; tensor cores cut what they add off.
                assert error < (2e-3 if linear else 5e-6), f"row {row}: relative error {error:.2e}"


@pytest.mark.parametrize("splits", [None, 1, 2, 5, 9])
@pytest.mark.parametrize("residual", ["regression", "linear"])
def test_dense_rows_leave_their_state(residual: str, splits: int | None) -> None:
    """More splits than some rows have pages, rows that end at a page and beside it, and one without a page."""
    lengths = [112, 12, 49, 16, 79]
    batch = case(SplaParameters(16, 16, 4, residual=residual), lengths)
    fold(batch, lengths, splits)
    check_states(batch, lengths)


@pytest.mark.parametrize(
    ("page", "block", "heads"),
    [(48, 16, (2, 2, 48)), (128, 32, (4, 1, 16)), (64, 64, (2, 1, 128)), (16, 16, (1, 1, 256))],
    ids=str,
)
def test_states_of_other_shapes(page: int, block: int, heads: tuple[int, int, int]) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # Triton's interpreter has no products of bf16
    lengths = [5 * page + 3, 2 * page]
    batch = case(
        SplaParameters(page, block, 8, **FP8), lengths, num_heads=heads[0], num_kv_heads=heads[1], head_size=heads[2],
        dtype=dtype,
    )  # fmt: skip
    for splits in (1, 3):
        batch.kv_cache[batch.state_table.flatten().long()] = float("nan")
        fold(batch, lengths, splits)
        check_states(batch, lengths)


@pytest.mark.parametrize("splits", [1, 3])
def test_states_of_chunks_and_cached_prefixes(splits: int) -> None:
    """A chunk takes the state of the one before on and reads none of its pages; blocks of another request, of another
    sequence in the same pages, and of a longer one are not trusted."""
    lengths = [150, 131, 70, 97]
    batch = case(SplaParameters(16, 16, 4), lengths)
    blocks = batch.state_table.long()
    fold(batch, [77, 131, 70, 97], splits)
    kept = batch.kv_cache.clone()
    for row, pages in ((0, 4), (1, 8)):  # covered pages: to fold one again would show
        batch.kv_cache[batch.block_table[row, :pages].long(), :, :16] = float("nan")
    batch.kv_cache[blocks[2]] = kept[blocks[3]]
    batch.keys[3] = torch.randn_like(batch.keys[3])
    batch.write(3, 0, 97)
    fold(batch, lengths, splits)
    check_states(batch, lengths)
    assert torch.equal(batch.kv_cache[blocks[1]].view(torch.int16), kept[blocks[1]].view(torch.int16))
    fold(batch, [150, 131, 40, 97], splits)  # fewer pages than the state covers
    check_states(batch, [150, 131, 40, 97])


@pytest.mark.parametrize("more", [{}, {"selector": "km2-rem"}, {"residual": "linear", "combine": "double_rmsnorm"}])
def test_launch_shapes_for_less_shared_memory(more: dict) -> None:
    batch = case(SplaParameters(16, 16, 5, **more), [330])
    check(batch, [(250, 330)], 3e-3, sample=7, tuning=NARROW)


def test_short_steps_attend_densely_where_selecting_takes_longer() -> None:
    """By the tokens of a step, where the user has said nothing."""
    layer = GpuLayer(SplaParameters(64, 64, 32, fine_block=16), Layer(32, 8, 128, torch.bfloat16, 1.0), DEVICE)
    sizes = limits(2, 1 << 20, max_num_tokens=8192, dense_below=8192)
    for where_it_pays, tokens, first in (
        (False, 512, 8192), (True, 8192, 8192), (True, 4096, 8192), (True, 2048, 11712), (True, 512, 22272),
        (True, 64, 120832),
    ):  # fmt: skip
        op = PrefillPasses(layer, replace(sizes, where_it_pays=where_it_pays))
        half = tokens // 2
        plan = op.planner.plan(0, [0, half, tokens], [first + half, first - half])
        assert not plan.passes[1:] and plan.passes[0].groups[0].tolist() == [0, 0, min(64, half), first]
        assert plan.passes[0].num_tokens == half and sum(rows.num_tokens for rows in plan.dense) == half


def test_splits_fill_the_device_once() -> None:
    params = SplaParameters(64, 64, 32)
    layer = GpuLayer(params, Layer(32, 8, 128, torch.bfloat16, 1.0), DEVICE)
    op = PrefillPasses(layer, limits(40, 1 << 20, max_num_tokens=8192, dense_below=1 << 20))
    for lengths, splits in (
        ([8192], [16]), ([1024], [4]), ([300], [1]), ([1024] * 8, [2] * 8), ([200] * 40, [1] * 40), ([64], [1]),
        ([100] * 20 + [8192] + [100] * 19, [1] * 20 + [11] + [1] * 19), ([70, 63, 8192, 4096], [1, 9, 4]),
    ):  # fmt: skip
        starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        folds = op.planner.plan(0, starts, lengths).folds
        assert folds is not None and folds.most_splits == max(splits)
        row, pages, cut, place = folds.rows.T.tolist()
        assert row == [i for i, length in enumerate(lengths) if length >= 64]
        assert pages == [length // 64 for length in lengths if length >= 64] and cut == splits
        assert folds.items.tolist() == [[i, split] for i, n in enumerate(splits) for split in range(n)]
        places = [p + split for p, n in zip(place, cut, strict=True) if n > 1 for split in range(n)]
        assert places == list(range(len(places))) and len(places) <= len(op.scratch["partial"])


# Real sizes

TWO = {"fine_block": 16, "fine_source": "int4", "least_candidates": 17, "statistics_dtype": "fp8"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("heads", "page", "dtype", "more"),
    [
        ((8, 2, 128), 64, torch.bfloat16, {"selection_block": 16, "selector": "km2-rem"}),
        ((8, 1, 64), 64, torch.bfloat16, {"selection_block": 32}),
        ((4, 1, 256), 64, torch.bfloat16, {"selection_block": 16, "selector": "km2-rem"}),
        ((8, 2, 128), 64, torch.bfloat16, {"selector": "km2-rem", "residual": "linear"}),
        ((8, 2, 128), 48, torch.float16, {"selection_block": 16, "top_p": 0.9}),
        ((4, 4, 64), 16, torch.bfloat16, {}),
        ((8, 2, 80), 64, torch.float16, {"selector": "taylor2"}),
        ((7, 1, 96), 32, torch.bfloat16, {"top_p": 0.8}),
        ((16, 1, 128), 128, torch.bfloat16, {"selector": "mean"}),
        ((8, 2, 256), 64, torch.bfloat16, {"residual": "none"}),
        ((16, 2, 128), 64, torch.bfloat16, {"residual": "linear", "combine": "double_rmsnorm"}),
        ((16, 4, 128), 64, torch.bfloat16, {}),
        ((16, 4, 128), 64, torch.bfloat16, FP8),
        ((16, 4, 128), 64, torch.bfloat16, TWO),
        ((8, 1, 64), 64, torch.float16, TWO | {"sinks": True}),
        ((4, 1, 256), 64, torch.bfloat16, TWO),
        ((12, 4, 80), 32, torch.bfloat16, TWO | {"residual": "linear", "top_p": 0.9}),
        (
            (32, 2, 128),
            128,
            torch.bfloat16,
            TWO | {"selection_block": 64, "selector": "km2-rem", "fine_source": "keys"},
        ),
        ((8, 2, 128), 64, torch.bfloat16, {"selection_block": 16, "selector": "km2-rem", **FP8}),
        ((7, 1, 96), 32, torch.float16, {"selector": "taylor2", "residual": "linear", **FP8}),
        ((4, 4, 64), 128, torch.bfloat16, {"selection_block": 32, "selector": "quest", "residual": "none", **FP8}),
        ((4, 1, 256), 64, torch.bfloat16, FP8),
    ],
    ids=[
        "g4-d128-p64-b16",
        "g8-d64-p64-b32",
        "g4-d256-p64-b16",
        "g4-d128-km2-linear",
        "g4-d128-p48-b16",
        "g1-d64-p16",
        "g4-d80-p64",
        "g7-d96-p32",
        "g16-d128-p128",
        "g4-d256-p64",
        "paper",
        "g4-d128-p64",
        "fp8-g4-d128-p64",
        "two-levels-g4-d128",
        "two-levels-g8-d64-sinks",
        "two-levels-g4-d256",
        "two-levels-g3-d80-linear",
        "two-levels-g16-d128-p128",
        "fp8-g4-d128-p64-b16-km2",
        "fp8-g7-d96-p32",
        "fp8-g1-d64-p128-b32",
        "fp8-g4-d256-p64",
    ],
)
def test_gpu_shapes(heads: tuple[int, int, int], page: int, dtype: torch.dtype, more: dict) -> None:
    num_heads, num_kv_heads, head_size = heads
    more = {"selection_block": page, **more}
    sinks = draw_sinks(num_heads, fresh()) if more.pop("sinks", False) else None
    params = SplaParameters(page, budget_blocks=6 * page // more["selection_block"], **more)
    edge = 6 * page
    lengths = [edge * 5 + 5, edge + 1, edge * 3 + page - 1]
    batch = make_batch(
        params, lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, dtype=dtype,
        device=DEVICE, seed=int(torch.seed() % 2**31), chunk=0, sinks=sinks,
    )  # fmt: skip
    ranges = [(edge * 2 + 3, lengths[0]), (0, lengths[1]), (edge * 3 - 9, lengths[2])]
    check(batch, ranges, 6e-3 if dtype is torch.float16 else 2e-2, sample=page * 2 - 1, max_groups=17)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "params",
    [
        SplaParameters(64, 64, 8, fine_block=16, least_candidates=24, fine_source="int4", **FP8),
        SplaParameters(64, 16, 32, selector="km2-rem"),
        SplaParameters(64, 16, 32, **FP8),
    ],
    ids=["default", "p64-b16-km2", "p64-b16-fp8"],
)
def test_gpu_chunk_sizes_agree(params: SplaParameters) -> None:
    """Chunks of 64 to 8192 tokens and all at once, behind a cached prefix."""
    batch = make_batch(
        params, [9000], num_heads=8, num_kv_heads=2, head_size=128, dtype=torch.bfloat16, device=DEVICE,
        seed=int(torch.seed() % 2**31), chunk=0,
    )  # fmt: skip
    start = 1088
    query, whole, _ = attend(batch, [(start, 9000)])
    for first, size in ((start, 64), (start, 1024), (start, 8192), (5056, 128), (8960, 192)):
        batch.kv_cache[batch.state_table[0].long()] = float("nan")
        assert_agree(in_chunks(batch, query[first - start :], first, size), whole[first - start :], 1e-2, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fine", [0, 16], ids=["one-level", "two-levels"])
@pytest.mark.parametrize("length", [480, 8000])
def test_gpu_passes_agree_bit_for_bit(length: int, fine: int) -> None:
    """Chunks that are whole tiles do the same arithmetic, whatever pass they are in, if their loops are not cut."""
    batch = make_batch(
        SplaParameters(16, 16, 4, residual="none", fine_block=fine, least_candidates=8), [length], num_heads=8,
        num_kv_heads=2, head_size=128, dtype=torch.bfloat16, device=DEVICE, seed=int(torch.seed() % 2**31), chunk=0,
    )  # fmt: skip
    tuning = PrefillTuning(most_splits=1)
    _, whole, _ = attend(batch, [(136, length)], tuning=tuning)
    _, cut, _ = attend(batch, [(136, length)], max_groups=2 if length == 480 else 67, tuning=tuning)
    assert torch.equal(whole, cut)
