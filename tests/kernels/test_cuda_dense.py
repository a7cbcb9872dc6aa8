"""Rows that attend densely on a GPU, without one: what is called with what, FlashAttention replaced."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from spla_backend.algorithm.combine import rms_norm
from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.kernels.gpu.attention import CudaPagedSpla, Plan
from spla_backend.kernels.gpu.dense_layer import CudaDense
from spla_backend.kernels.gpu.prefill.passes import DenseRows

HEADS, SIZE, EPS = 4, 8, 0.1


@pytest.mark.parametrize("combine", ["shared_normalizer", "double_rmsnorm"])
def test_dense_rows_of_a_prefill(combine):
    """Under `double_rmsnorm` they are normalised like what the kernels attend to exactly."""
    generator = torch.Generator().manual_seed(0)
    weight, attended = (torch.randn(*shape, generator=generator) for shape in ((HEADS, SIZE), (5, HEADS, SIZE)))
    params = SplaParameters(64, 64, 4, residual="linear", combine=combine, rms_norm_eps=EPS)
    op = CudaPagedSpla.__new__(CudaPagedSpla)
    op._decode = SimpleNamespace(params=params, norm_weights=(weight, torch.full_like(weight, torch.nan)))
    rows = DenseRows(2, 5, 0, torch.tensor([0, 5]), torch.tensor([5]), 5, 5)
    op._attend_densely = lambda rows, query, kv_cache, table, out: out[2:7].copy_(attended)
    prefill = SimpleNamespace(dense=[rows], folds=None, passes=[])
    output = torch.full((9, HEADS, SIZE), torch.nan, dtype=torch.bfloat16)
    nothing = torch.empty(0)
    op.run(Plan(0, 0, 1, nothing, nothing, nothing, prefill), nothing, nothing, None, None, output)
    stored = attended.bfloat16().float()
    expected = stored if combine == "shared_normalizer" else rms_norm(stored, weight, EPS)
    torch.testing.assert_close(output[2:7], expected.bfloat16())
    assert output[:2].isnan().all() and output[7:].isnan().all()


def test_plan_of_a_dense_layer():
    """Two decode rows, two prefill rows: each kind in a call of its own, with lengths that a graph may replay."""
    op = CudaDense.__new__(CudaDense)
    op._max_model_len = 4096
    starts, lens, table = torch.tensor([0, 1, 2, 7, 10]), torch.tensor([70, 5, 5, 90]), torch.zeros(4, 64)
    plan = op.plan(
        starts,
        lens,
        table,
        num_decodes=2,
        num_decode_tokens=2,
        decode_query_len=1,
        prefill_starts=[2, 7, 10],
        prefill_lens=[5, 90],
    )
    decode, prefill = plan.rows
    assert (decode.first_token, decode.num_tokens, decode.first_row, decode.max_query_len) == (0, 2, 0, 1)
    assert (decode.start_loc.tolist(), decode.seq_lens.tolist(), decode.max_seq_len) == ([0, 1, 2], [70, 5], 4096)
    assert (prefill.first_token, prefill.num_tokens, prefill.first_row, prefill.max_query_len) == (2, 8, 2, 5)
    assert (prefill.start_loc.tolist(), prefill.seq_lens.tolist(), prefill.max_seq_len) == ([0, 5, 8], [5, 90], 90)


def test_dense_layers_have_plans_of_their_own():
    sparse, dense = CudaPagedSpla.__new__(CudaPagedSpla), CudaDense.__new__(CudaDense)
    sparse._prefill = dense._prefill = SimpleNamespace(dense_below=0)
    assert sparse.plan_key != dense.plan_key
