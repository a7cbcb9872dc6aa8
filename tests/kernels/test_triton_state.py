"""Folding until valid: what the state blocks hold after a step, whatever they held before."""

import pytest
import torch
from triton_cases import Batch, make_batch

from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.algorithm.reference import apply_feature_map, key_features, recurrent_state
from spla_backend.kernels.layout import STATE_MAGIC

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(residual: str = "regression", length: int = 100, head_size: int = 32) -> Batch:
    params = SplaParameters(16, 16, 4, residual=residual)
    return make_batch(params, [length], num_heads=2, num_kv_heads=2, head_size=head_size, device=DEVICE)


def body(batch: Batch) -> torch.Tensor:
    """`[G, body_rows, d]` float32."""
    layout, d = batch.layer.state_layout, batch.layer.head_size
    blocks = batch.kv_cache.view(torch.float32)[batch.state_table[0, : layout.num_blocks].long()]
    rows = blocks.unflatten(-1, (-1, d)).flatten(2, 3)  # [K, G, R, d]
    return rows[:, :, 1:].transpose(0, 1).flatten(1, 2)[:, : layout.body_rows].cpu()


def header(batch: Batch) -> torch.Tensor:
    return batch.kv_cache.view(torch.int32)[batch.state_table[0].long(), :, 0, :8].cpu()  # [K, G, 8]


def check(batch: Batch, tolerance: float = 1e-5) -> None:
    layer = batch.layer
    covered = (batch.lengths[0] - 1) // layer.params.page_size
    layout, tokens = layer.state_layout, covered * layer.params.page_size
    for head in range(layer.num_kv_heads):
        keys, values = (x[0][:tokens, head].double().cpu() for x in (batch.keys, batch.values))
        if layer.params.residual == "linear":
            features = apply_feature_map("softmax", keys)
        else:
            features = key_features(keys, layer.params)
        s, z = recurrent_state(features, values)
        got = body(batch)[head].double()
        assert float((got[: layout.s_rows] - s).norm() / s.norm()) < tolerance
        z = z[: layout.z_size]
        assert float((got[layout.s_rows :].flatten()[: layout.z_size] - z).norm() / z.norm()) < tolerance
    stamp = batch.kv_cache.view(torch.int32).flatten(2)[int(batch.block_table[0, covered - 1]), :, -4:].cpu()
    heads = header(batch)
    for ordinal in range(layout.num_blocks):
        for head in range(layer.num_kv_heads):
            expected = [STATE_MAGIC, covered, *stamp[head].tolist(), ordinal, 0]
            assert heads[ordinal, head].tolist() == expected


def step(batch: Batch, tokens: int = 1) -> None:
    """Append tokens to the row and decode the last."""
    shape = (tokens, *batch.keys[0].shape[1:])
    batch.keys[0] = torch.cat([batch.keys[0], torch.randn(shape, device=DEVICE).to(batch.keys[0].dtype)])
    batch.values[0] = torch.cat([batch.values[0], torch.randn(shape, device=DEVICE).to(batch.keys[0].dtype)])
    start = batch.lengths[0]
    batch.lengths[0] += tokens
    batch.seq_lens += tokens
    batch.write(0, start, start + tokens)
    batch.decode()


@pytest.mark.parametrize("residual", ["regression", "linear"])
@pytest.mark.parametrize("head_size", [16, 48], ids=["d16", "d48"])
def test_rebuild_and_steady_steps(residual: str, head_size: int) -> None:
    params = SplaParameters(16, 16, 4, residual=residual)
    batch = make_batch(
        params, [62], num_heads=2, num_kv_heads=1, head_size=head_size, device=DEVICE, max_model_len=128
    )  # fmt: skip
    tolerance = 1e-5 if residual == "regression" else 2e-3  # features are rounded to the cache dtype
    batch.decode()
    check(batch, tolerance)
    for _ in range(4):  # over a page's end
        step(batch)
        check(batch, tolerance)


def test_valid_state_is_not_read_again() -> None:
    batch = make()
    batch.decode()
    before = body(batch)
    page = int(batch.block_table[0, 2])
    batch.kv_cache[page, :, :16] = float("nan")  # a covered page: folding it again would show
    batch.decode()
    assert torch.equal(body(batch), before)


@pytest.mark.parametrize("what", ["magic", "ordinal", "stamp", "covered", "covered-far", "covered-negative"])
def test_state_that_must_not_be_trusted(what: str) -> None:
    batch = make()
    batch.decode()
    word, value = {
        "magic": (0, 7),
        "ordinal": (6, 5),
        "stamp": (4, -1),
        "covered": (1, 3),  # the stamp belongs to another page
        "covered-far": (1, 1 << 30),
        "covered-negative": (1, -5),
    }[what]
    block = int(batch.state_table[0, -1 if what != "covered" else 0])
    batch.kv_cache.view(torch.int32)[block, :, 0, word] = value
    batch.kv_cache.view(torch.float32)[block, :, 2:] = 1e9  # and its body is someone else's
    batch.decode()
    check(batch)


def test_prefix_hit_takes_a_state_of_fewer_pages_on() -> None:
    batch = make_batch(SplaParameters(16, 16, 4), [50], num_heads=2, num_kv_heads=2, head_size=32, device=DEVICE,
                       max_model_len=128)  # fmt: skip
    batch.decode()
    check(batch)
    step(batch, 40)  # several pages at once
    check(batch)


def test_pages_replaced_under_a_state() -> None:
    batch = make()
    batch.decode()
    batch.keys[0] = torch.randn_like(batch.keys[0])
    batch.write(0, 0, 100)  # the same page ids hold another sequence
    batch.decode()
    check(batch)
