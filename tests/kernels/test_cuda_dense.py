"""Rows that attend densely on a GPU, without one: what is called with what, FlashAttention replaced."""

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from spla_backend.algorithm.combine import rms_norm
from spla_backend.algorithm.parameters import SplaParameters
from spla_backend.kernels.gpu import attention
from spla_backend.kernels.gpu.attention import GpuAttention, run_prefill
from spla_backend.kernels.gpu.dense import DenseRows, attend_densely
from spla_backend.kernels.gpu.dense_layer import GpuDenseAttention
from spla_backend.kernels.gpu.layer import GpuLayer
from spla_backend.kernels.gpu.prefill.plan import PrefillPlan
from spla_backend.kernels.interface import Layer, Limits, Step

HEADS, SIZE, EPS = 4, 16, 0.1
LIMITS = Limits(4, 1, 4096, 64, prefill_dense_below=0, largest_budget=0)


@pytest.mark.parametrize("combine", ["shared_normalizer", "double_rmsnorm"])
def test_dense_rows_of_a_prefill(combine, monkeypatch):
    """Under `double_rmsnorm` they are normalised like what the kernels attend to exactly."""
    generator = torch.Generator().manual_seed(0)
    weight, attended = (torch.randn(*shape, generator=generator) for shape in ((HEADS, SIZE), (5, HEADS, SIZE)))
    params = SplaParameters(64, 64, 4, residual="linear", combine=combine, rms_norm_eps=EPS)
    weights = (weight, torch.full_like(weight, torch.nan))
    layer = GpuLayer(params, Layer(HEADS, 1, SIZE, torch.bfloat16, 1.0, norm_weights=weights), "cpu")
    rows = DenseRows(2, 5, 0, torch.tensor([0, 5]), torch.tensor([5]), 5, 5)
    monkeypatch.setattr(attention, "attend_densely", lambda *arguments: arguments[-1][2:7].copy_(attended))
    output = torch.full((9, HEADS, SIZE), torch.nan, dtype=torch.bfloat16)
    nothing = torch.empty(0)
    plan = PrefillPlan([rows], [], None)
    run_prefill(SimpleNamespace(layer=layer), plan, nothing, nothing, None, nothing, None, output)
    stored = attended.bfloat16().float()
    expected = stored if combine == "shared_normalizer" else rms_norm(stored, weight, EPS)
    torch.testing.assert_close(output[2:7], expected.bfloat16())
    assert output[:2].isnan().all() and output[7:].isnan().all()


def make(kind):
    layer = Layer(HEADS, 1, SIZE, torch.bfloat16, 1.0)
    return kind(SplaParameters(64, 64, 4), layer, LIMITS, torch.device("cpu"))


def test_plan_of_a_dense_layer():
    """Two decode rows, two prefill rows: each kind in a call of its own, with lengths that a graph may replay."""
    starts, lens, table = torch.tensor([0, 1, 2, 7, 10]), torch.tensor([70, 5, 5, 90]), torch.zeros(4, 64)
    decode, prefill = make(GpuDenseAttention).plan(Step.of(starts, lens, table)).rows
    assert (decode.first_token, decode.num_tokens, decode.first_row, decode.max_query_len) == (0, 2, 0, 1)
    assert (decode.start_loc.tolist(), decode.seq_lens.tolist(), decode.max_seq_len) == ([0, 1, 2], [70, 5], 4096)
    assert (prefill.first_token, prefill.num_tokens, prefill.first_row, prefill.max_query_len) == (2, 8, 2, 5)
    assert (prefill.start_loc.tolist(), prefill.seq_lens.tolist(), prefill.max_seq_len) == ([0, 5, 8], [5, 90], 90)


def test_dense_layers_have_plans_of_their_own():
    sparse, dense = make(GpuAttention), make(GpuDenseAttention)
    assert sparse.plan_key != dense.plan_key
    assert (sparse.page_layout, sparse.state_layout) == (dense.page_layout, dense.state_layout)


def test_sinks_go_to_flash_attention(monkeypatch):
    """The model's own parameter does, for dense prompts and dense layers, so that its values are those of the step."""
    calls, sinks = [], torch.nn.Parameter(torch.zeros(HEADS, dtype=torch.bfloat16))
    stand_in = SimpleNamespace(
        flash_attn_varlen_func=lambda **arguments: calls.append(arguments),
        get_flash_attn_version=lambda head_size, has_sinks: 3 if has_sinks else 2,
    )
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.fa_utils", stand_in)
    rows = DenseRows(2, 5, 0, torch.tensor([0, 5]), torch.tensor([5]), 5, 5)
    query = torch.zeros(9, HEADS, SIZE, dtype=torch.bfloat16)
    for of_layer in (sinks, None):
        layer = Layer(HEADS, 1, SIZE, torch.bfloat16, 1.0, sinks=of_layer)
        gpu_layer = GpuLayer(SplaParameters(64, 64, 4), layer, "cpu")
        attend_densely(gpu_layer, rows, query, gpu_layer.empty_pages(2), torch.zeros(1, 4), torch.empty_like(query))
    assert [call["s_aux"] for call in calls] == [sinks, None]
    assert [call["fa_version"] for call in calls] == [3, 2]
