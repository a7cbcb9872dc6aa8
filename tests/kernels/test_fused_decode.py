"""The fused decode launch against the float64 reference: emulated on the CPU, and on a GPU."""

import random

import pytest
import torch
from emulated import COMPILER, EmulatedDecode
from triton_cases import make_batch

from spla_backend.algorithm.parameters import SplaParameters

GPU = torch.cuda.is_available()
emulated = pytest.mark.skipif(COMPILER is None, reason="needs g++ to emulate the kernel")


def fresh() -> int:
    return random.randrange(1 << 30)


def emulate(batch, blocks: int) -> None:
    """Let the batch's op decode with the emulated kernel."""
    op = batch.op
    op.fused = EmulatedDecode(
        op.params, group=op.group, num_kv_heads=op.num_kv_heads, head_size=op.head_size, cache_dtype=op.cache_dtype,
        scale=op.scale, page_layout=op.page_layout, state_layout=op.state_layout,
        max_model_len=op.max_pages * op.params.page_size, blocks=blocks,
    )  # fmt: skip


@emulated
@pytest.mark.parametrize("blocks", [1, 2, 16])
def test_lengths_around_page_and_budget_edges_and_padding(blocks: int) -> None:
    params = SplaParameters(16, 16, 5)
    lengths = [1, 15, 16, 17, 80, 81, 96, 97, 300, 0]
    batch = make_batch(params, lengths, num_heads=8, num_kv_heads=2, head_size=64, seed=fresh())
    emulate(batch, blocks)
    batch.check(batch.decode(), 2e-3)
    again = batch.decode()
    batch.check(again, 2e-3)


@emulated
@pytest.mark.parametrize("heads", [1, 2, 7], ids=lambda n: f"group{n}")
def test_groups(heads: int) -> None:
    batch = make_batch(
        SplaParameters(32, 32, 4), [331, 128], num_heads=heads, num_kv_heads=1, head_size=128, dtype=torch.bfloat16,
        seed=fresh(), gain=torch.rand(heads) * 2,
    )  # fmt: skip
    emulate(batch, 4)
    batch.check(batch.decode(), 1e-2)


@emulated
@pytest.mark.parametrize("selector", ["taylor2", "cumulant2", "quest"])
def test_selectors(selector: str) -> None:
    residual = "none" if selector == "quest" else "regression"
    params = SplaParameters(16, 16, 5, selector=selector, residual=residual)
    batch = make_batch(params, [250, 81], num_heads=4, num_kv_heads=1, head_size=64, seed=fresh())
    emulate(batch, 2)
    batch.check(batch.decode(), 2e-3)


@emulated
def test_ties_go_to_the_lower_page() -> None:
    batch = make_batch(SplaParameters(16, 16, 5), [200], num_heads=8, num_kv_heads=2, head_size=64, seed=fresh())
    batch.keys[0][:] = batch.keys[0][:16].repeat(13, 1, 1)[:200]
    batch.write(0, 0, 200)
    emulate(batch, 2)
    batch.decode()
    for head in range(2):
        assert batch.selected(0, 0, head) == [0, 1, 2, 11, 12]
