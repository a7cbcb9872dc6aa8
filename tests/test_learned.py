"""`spla.safetensors`: what is written is read, and what does not fit is refused in one sentence."""

import json

import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from spla_backend import learned  # noqa: E402
from spla_backend.learned import LayerParameters  # noqa: E402

HEADS, SIZE = 4, 8
SHAPE = {"num_heads": HEADS, "num_kv_heads": 2, "head_size": SIZE}


def gains(*layers: int) -> dict[int, LayerParameters]:
    return {i: LayerParameters(gain=torch.rand(HEADS), residual_scale=torch.rand(1)) for i in layers}


def norms(*layers: int) -> dict[int, LayerParameters]:
    return {i: LayerParameters(exact_norm=torch.randn(HEADS, SIZE), tail_norm=torch.randn(HEADS, SIZE)) for i in layers}


@pytest.mark.parametrize(("make", "combine"), [(gains, "shared_normalizer"), (norms, "double_rmsnorm")])
def test_round_trip(tmp_path, make, combine):
    path = tmp_path / learned.FILE_NAME
    layers = make(0, 2)
    options = {"budget": 512, "combine": combine, "fine_block_size": 16, "statistics_dtype": "fp8"}
    learned.write(path, layers, {"budget": 512})  # as when one level was the default
    assert learned.read_options(path) == {"budget": 512, "fine_block_size": 0, "statistics_dtype": "auto"}
    learned.write(path, layers, options)
    assert learned.read_options(path) == options
    learned.check(path, layers=[0, 2], combine=combine, residual="linear", **SHAPE)
    for i, expected in layers.items():
        assert learned.read_layer(path, i, **SHAPE).same(expected)


def test_heads_of_ranks():
    whole = LayerParameters(gain=torch.rand(HEADS), exact_norm=torch.rand(HEADS, SIZE))
    parts = [whole.heads(rank, 2) for rank in (0, 1)]
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(torch.cat([part.tensors()[name] for part in parts]), tensor, rtol=0, atol=0)
    assert LayerParameters(residual_scale=torch.ones(1)).heads(1, 2).residual_scale == 1
    features = LayerParameters(feature_weight=torch.arange(2.0).view(2, 1, 1))  # two kv heads
    for world_size, expected in ((1, [[0, 1]]), (2, [[0], [1]]), (4, [[0], [0], [1], [1]])):
        ranks = [features.heads(rank, world_size).feature_weight.flatten().tolist() for rank in range(world_size)]
        assert ranks == expected
    with pytest.raises(ValueError, match="cannot share 4 heads evenly between 3 ranks"):
        whole.heads(0, 3)


def write_raw(path, tensors, **metadata):
    safetensors_torch.save_file(tensors, path, metadata={"format": "spla", "version": "1", **metadata})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.0.gain": torch.ones(4), "layers.1.bias": torch.ones(4)}, "unknown tensor 'layers.1.bias': .*knows"),
        ({"gain": torch.ones(4)}, "unknown tensor 'gain'"),
        ({"layers.0.gain": torch.ones(4)}, r"lacks layers.1.gain, it holds the parameter for 0 and SPLA computes 0-1"),
        ({"layers.0.gain": torch.ones(3)}, r"layers.0.gain is F32 \[3\] and should be F32 \[4\] for this model"),
        ({"layers.0.gain": torch.ones(4).bfloat16()}, r"is BF16 \[4\] and should be F32 \[4\]"),
        ({"layers.7.gain": torch.ones(4)}, r"layer 7 is none that SPLA computes in this model \(those are 0-1\)"),
        ({"layers.0.feature_weight": torch.ones(4, 8, 8)}, r"is F32 \[4, 8, 8\] and should be F32 \[2, 8, 8\]"),
        ({"layers.0.feature_weight": torch.ones(2, 8, 8)}, "residual 'regression' makes no use of: set residual to"),
        ({"layers.0.tail_norm": torch.ones(4, 8)}, "combine 'shared_normalizer' makes no use of: set"),
    ],
    ids=["unknown", "name", "missing", "shape", "dtype", "layer", "kv heads", "residual", "combine"],
)  # fmt: skip
def test_refused(tmp_path, tensors, message):
    path = tmp_path / learned.FILE_NAME
    write_raw(path, tensors)
    with pytest.raises(ValueError, match=message):
        learned.check(path, layers=[0, 1], combine="shared_normalizer", residual="regression", **SHAPE)


def test_dense_layers_need_no_parameters(tmp_path):
    path = tmp_path / learned.FILE_NAME
    write_raw(path, {"layers.1.gain": torch.ones(HEADS)})
    learned.check(path, layers=[0, 1], dense_layers=[0], combine="shared_normalizer", residual="regression", **SHAPE)


def test_a_file_of_options_alone(tmp_path):
    path = tmp_path / learned.FILE_NAME
    learned.write(path, {}, {"dense_layers": [1]})
    assert learned.check(path, layers=[0, 1], combine="double_rmsnorm", residual="linear", **SHAPE) == set()
    assert learned.read_layer(path, 0, **SHAPE) == LayerParameters()


def test_half_a_norm_is_refused(tmp_path):
    path = tmp_path / learned.FILE_NAME
    write_raw(path, {"layers.0.exact_norm": torch.ones(HEADS, SIZE)})
    with pytest.raises(ValueError, match=r"lacks layers.0.tail_norm, it holds the parameter for no layer"):
        learned.check(path, layers=[0], combine="double_rmsnorm", residual="linear", **SHAPE)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "its header does not say format 'spla'"),
        ({"version": "2"}, "is of version 2 and this vllm-spla reads version 1"),
        ({"spla_config": "{"}, "is not JSON"),
        ({"spla_config": "[]"}, "is not a JSON object"),
    ],
)
def test_refused_headers(tmp_path, metadata, message):
    path = tmp_path / learned.FILE_NAME
    write_raw(path, {"layers.0.gain": torch.ones(4)}, **metadata)
    with pytest.raises(ValueError, match=message):
        learned.read_options(path)


def test_values(tmp_path):
    path = tmp_path / learned.FILE_NAME
    write_raw(
        path, {"layers.0.gain": torch.tensor([1.0, -1.0, 1.0, 1.0]), "layers.1.gain": torch.full((4,), torch.nan)}
    )
    for layer in (0, 1):
        with pytest.raises(
            ValueError, match=f"negative gains or scales or numbers that are not finite for layer {layer}"
        ):
            learned.read_layer(path, layer, **SHAPE)
    with pytest.raises(ValueError, match="holds nothing for layer 2"):
        learned.read_layer(path, 2, **SHAPE)
    path.write_text("not safetensors")
    with pytest.raises(ValueError, match=r"cannot read .* as safetensors"):
        learned.read_options(path)


def test_find(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.chdir(tmp_path)
    assert learned.find(str(model)) is None
    assert learned.find("no-such/model", None) is None
    learned.write(model / learned.FILE_NAME, gains(0), {})
    learned.write(model / "other.safetensors", gains(0), {})
    learned.write(tmp_path / "here.safetensors", gains(0), {})
    assert learned.find(str(model), None, {"budget": 512}) == model / learned.FILE_NAME

    def named(*files):
        return learned.find(str(model), *({"parameters_file": file} for file in files))

    assert named("none") is None
    assert named("other.safetensors", "none") == model / "other.safetensors"
    assert named("here.safetensors").samefile(tmp_path / "here.safetensors")
    with pytest.raises(ValueError, match=r"finds no file of learned parameters at nowhere.safetensors, .*or to 'none'"):
        named("nowhere.safetensors")


def test_beside_weights(tmp_path):
    """vLLM would take every safetensors file for weights: an index says which are."""
    weights = {"model.embed": torch.ones(2), "model.head": torch.ones(2)}
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors")
    path = tmp_path / learned.FILE_NAME
    write_raw(path, {"layers.0.gain": torch.ones(4)})
    with pytest.raises(ValueError, match=r"lies beside weights without model.safetensors.index.json.*move it"):
        learned.check_place(path)
    learned.write(path, gains(0), {})
    learned.check_place(path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(weights, "model.safetensors")
    assert index["metadata"]["total_size"] == (tmp_path / "model.safetensors").stat().st_size
