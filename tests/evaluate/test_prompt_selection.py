"""`benchmarks/prompt_selection.py` on a tiny model, and the arithmetic of `benchmarks/prompt_costs.py`."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from spla_backend.algorithm.parameters import SplaParameters  # noqa: E402
from spla_backend.algorithm.sequence import spla_attention  # noqa: E402
from spla_backend.evaluate.capture import AttentionInputs  # noqa: E402
from spla_backend.evaluate.variants import ModelShape  # noqa: E402

from .test_reports import save_with_tokenizer  # noqa: E402

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {"budget": 256, "fine_block_size": 16, "candidates": 512, "fine_source": "keys"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def of(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield of
    for name in ("prompt_selection", "prompt_costs", "two_models"):
        sys.modules.pop(name, None)


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "vocab_size": 64}
    return save_with_tokenizer(
        folder, std=0.4, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, **sizes
    )


def test_report(load, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a small case; what is there is not measured again, and where all is selected nothing is lost."""
    program = load("prompt_selection")
    variants = {
        "by token": SMALL,
        "tile 32": {**SMALL, "tile": 32},
        "tile 32, fp8": {**SMALL, "tile": 32, "fine_dtype": "fp8"},
        "tile 32, chunks of 20": {**SMALL, "tile": 32, "chunk": 20},
        "tile 32, candidates of 64": {**SMALL, "tile": 32, "candidate_tile": 64},
        "dense below 704": {**SMALL, "tile": 32, "dense_below": 704},
        "whole": {"budget": 768, "fine_block_size": 0, "tile": 32},
    }
    monkeypatch.setattr(program, "VARIANTS", variants)
    monkeypatch.setitem(program.FIRST, 768, 512)
    words = torch.randint(63, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in words))
    output = tmp_path / "report.json"
    arguments = ["--text", str(tmp_path / "text.txt"), "--models", f"tiny={model}", "--contexts", "768"]
    monkeypatch.setattr(sys, "argv", ["prompt_selection.py", *arguments, "--output", str(output)])
    program.main()
    rows = {row["variant"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == list(variants)
    losses = {name: row["loss"] for name, row in rows.items()}
    assert abs(losses["whole"]) < 1e-5
    assert all(abs(loss) > 1e-4 for name, loss in losses.items() if name != "whole")
    assert len(set(losses.values())) == len(losses)
    assert "ms_128k" not in rows["by token"] and rows["tile 32"]["ms_128k"] > rows["tile 32"]["ms_32k"] > 0
    assert rows["dense below 704"]["selects_from"] == 704

    stored = json.loads(output.read_text())
    stored["rows"][1] |= {"loss": 7.0, "ms_128k": 0.0}
    output.write_text(json.dumps(stored))
    program.main()
    again = json.loads(output.read_text())["rows"]
    assert again[1]["loss"] == 7.0 and again[1]["ms_128k"] == rows["tile 32"]["ms_128k"]


@torch.inference_mode()
def test_pieces_of_a_prompt(load, model: str) -> None:
    """Dense up to where selecting begins, then chunks whose cuts are multiples of their size."""
    program, shape = load("prompt_selection"), ModelShape.of(model)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 768, 16, generator=generator) for n in (4, 2, 2))
    inputs = AttentionInputs(1, q, k, v)
    variant = {**SMALL, "tile": 32}
    params = program.Prompt(variant, shape).layers[1]
    assert params.tile == 32 and params.whole_tokens == 512
    whole = spla_attention(q[None], k[None], v[None], params)[0]
    alone = program.Prompt(variant, shape)(inputs)
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(program.Prompt({**variant, "chunk": 64}, shape)(inputs), whole, atol=1e-5, rtol=1e-4)
    cut = program.Prompt({**variant, "chunk": 100}, shape)(inputs)
    differs = ((cut - whole).abs() > 1e-3).any(-1).any(0).nonzero()[:, 0]
    tiles = set((differs // 32).tolist())
    assert tiles and tiles <= {600 // 32, 700 // 32}
    late = program.Prompt({**variant, "dense_below": 640}, shape)(inputs)
    dense = spla_attention(q[None], k[None], v[None], replace(params, budget_blocks=12))[0]
    torch.testing.assert_close(late[:, :640], dense[:, :640], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(late[:, 640:], whole[:, 640:], atol=1e-5, rtol=1e-4)
    assert (dense - whole)[:, 512:640].abs().max() > 1e-2
    assert program.Prompt({"budget": 768}, shape)(inputs) is None


def test_arithmetic(load) -> None:
    """By hand: one tile at 128K, and a prompt as the sum of its tiles."""
    costs = load("prompt_costs")
    import numpy as np

    params = SplaParameters(64, 64, 32, fine_block=16, least_candidates=128, tile=32)
    stages = costs.stages_of(params, np.array([131071]))
    assert stages["fine"].products[0] == pytest.approx(2 * 128 * 8192 * 128 / costs.TENSOR)
    assert stages["attention"].products[0] == pytest.approx(4 * 128 * 2048 * 128 / costs.TENSOR)
    assert stages["attention"].copies[0] == pytest.approx(2048 * 512 / costs.L2)
    assert stages["coarse"].products[0] == pytest.approx(2 * 2 * 128 * 2047 * 256 / costs.TENSOR)
    assert stages["residual"].products[0] == pytest.approx(2 * 128 * (2048 * 128 + 128 * 129) / costs.TENSOR)
    few = costs.stages_of(params, np.array([8223]))["coarse"]  # all 128 pages are candidates: masses alone
    assert few.products[0] == pytest.approx(2 * 128 * 128 * 256 / costs.TENSOR)
    # Rows below 64 are multiplied all the same.
    half, quarter = (costs.stages_of(replace(params, tile=t), np.array([131071]))["fine"] for t in (16, 8))
    assert half.products[0] == quarter.products[0] == pytest.approx(stages["fine"].products[0] / 2)
    # Fewer are scored, all attend and have masses: 64 and 192 rows in the first pass, 64 in the second.
    some = costs.stages_of(replace(params, tile=64, tile_step=4), np.array([131071]))
    assert some["fine"].products[0] == half.products[0]
    assert some["attention"].products[0] == 2 * stages["attention"].products[0]
    assert some["coarse"].products[0] == pytest.approx(2 * (256 + 64) * 2047 * 256 / costs.TENSOR)
    # Two tiles of 32 rows that are scored multiply 64 together; masses are of 256, of which 64 are scored anyway.
    alone, paired = (
        costs.stages_of(replace(params, tile_step=4, candidate_tile=c), np.array([131071])) for c in (0, 64)
    )
    for of in (alone, paired):
        assert of["attention"].products[0] == stages["attention"].products[0]
    assert paired["fine"].products[0] == pytest.approx(alone["fine"].products[0] / 2)
    assert paired["fine"].copies[0] == pytest.approx(alone["fine"].copies[0] / 2)
    assert paired["fine"].instructions[0] == alone["fine"].instructions[0]
    assert paired["coarse"].products[0] == pytest.approx(some["coarse"].products[0] / 2)
    assert paired["coarse"].copies[0] == pytest.approx(2 * 2047 * 256 * 2 / costs.L2 / 2)
    assert paired["other"].instructions[0] == pytest.approx(1.5 * costs.SELECT_SECONDS)

    ends = np.arange(16384, 32768, 32) + 31
    want = 8e3 * costs.seconds_of(params, ends, False).sum() + 1e3 * (
        costs.dense_seconds(16384) + costs.STATE_SECONDS * 512
    )
    assert costs.milliseconds(params, 32768, 16384, False)["all"] == pytest.approx(want)
    assert costs.milliseconds(params, 32768, 32768, False)["all"] == pytest.approx(1e3 * costs.DENSE_SECONDS / 16)
    begin = costs.selects_from(params)
    found = [costs.milliseconds(params, 32768, start, False)["all"] for start in (begin - 1024, begin, begin + 1024)]
    assert found[1] == min(found)
    row = costs.predicted(params)
    assert row["selects_from"] == begin and row["in_turn_ms_128k"] > row["ms_128k"]
