"""`benchmarks/serving.py` on a tiny model: dense and SPLA in its process, then SPLA through server and client."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving.py"
COUNTS = ("requests", "prompt", "output")
TIMES = ("wall_s", "out_tok_s", "ttft_median_s", "ttft_max_s", "tpot_ms", "tpot_last_ms")


def measured(output: Path, multiprocessing: str, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--small", *arguments, "--output", str(output)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert done.stdout.splitlines()[-1].split()[:2] == [result["rows"][-1]["scenario"], result["rows"][-1]["backend"]]
    return result


@pytest.mark.timeout(1800)
def test_rows(tmp_path):
    first = measured(tmp_path / "first.json", "0", "--only", "document", "4x300")
    names = [(row["scenario"], row["backend"]) for row in first["rows"]]
    assert names == [(s, b) for s in ("4x300", "document") for b in ("dense", "spla")]

    # A start of vLLM's client costs more than what it measures, so that one scenario stands for all over HTTP.
    arguments = ("--only", "document-http", "--backends", "spla", "--merge", str(tmp_path / "first.json"))
    both = measured(tmp_path / "both.json", "1", *arguments)
    assert both["rows"][:-1] == first["rows"] and both["rows"][-1]["scenario"] == "document-http"
    assert both["command"].startswith(first["command"] + " && python ")
    for row in both["rows"]:
        # Prompts of one scenario are in no cache, those of the document are as far as the document goes.
        assert row["cached"] == (512 if row["scenario"].startswith("document") else 0)
        assert all(row[name] > 0 for name in COUNTS + TIMES) and row["preemptions"] == 0
        assert row["ttft_median_s"] <= row["ttft_max_s"] <= row["wall_s"]
        assert row["out_tok_s"] == pytest.approx(row["requests"] * row["output"] / row["wall_s"], rel=0.02)
