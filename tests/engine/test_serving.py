"""`benchmarks/serving.py` on a tiny model: dense and SPLA in its process, then SPLA through server and client."""

import json
import signal
import sys
from pathlib import Path

import pytest

from .conftest import counted

pytestmark = pytest.mark.engine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COUNTS = ("requests", "prompt", "output")
TIMES = ("wall_s", "out_tok_s", "ttft_median_s", "ttft_max_s", "tpot_ms", "tpot_last_ms")


@pytest.fixture
def measured(monkeypatch, capsys):
    """What the script writes; the engines of scenarios without a server are in this process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serving

    def measured(output: Path, *arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["benchmarks/serving.py", "--small", *arguments, "--output", str(output)])
        with counted():
            serving.main()
        result, lines = json.loads(output.read_text()), capsys.readouterr().out.splitlines()
        assert lines[-1].split()[:2] == [result["rows"][-1]["scenario"], result["rows"][-1]["backend"]]
        return result

    terminate = signal.getsignal(signal.SIGTERM)
    yield measured
    signal.signal(signal.SIGTERM, terminate)


@pytest.mark.timeout(1800)
def test_rows(tmp_path, measured, monkeypatch):
    first = measured(tmp_path / "first.json", "--only", "document", "4x300")
    names = [(row["scenario"], row["backend"]) for row in first["rows"]]
    assert names == [(s, b) for s in ("4x300", "document") for b in ("dense", "spla")]

    # A start of vLLM's client costs more than what it measures, so that one scenario stands for all over HTTP.
    arguments = ("--only", "document-http", "--backends", "spla", "--merge", str(tmp_path / "first.json"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    both = measured(tmp_path / "both.json", *arguments)
    assert both["rows"][:-1] == first["rows"] and both["rows"][-1]["scenario"] == "document-http"
    assert both["command"].startswith(first["command"] + " && python ")
    for row in both["rows"]:
        # Prompts of one scenario are in no cache, those of the document are as far as the document goes.
        assert row["cached"] == (512 if row["scenario"].startswith("document") else 0)
        assert all(row[name] > 0 for name in COUNTS + TIMES) and row["preemptions"] == 0
        assert row["ttft_median_s"] <= row["ttft_max_s"] <= row["wall_s"]
        assert row["out_tok_s"] == pytest.approx(row["requests"] * row["output"] / row["wall_s"], rel=0.02)
