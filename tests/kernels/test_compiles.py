"""Every Triton kernel compiles for a GPU, by `scripts/machine_code.py`: in a process of its own, because in this one
kernels are interpreted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/machine_code.py"
ONLY = (
    r"^main: (store 8|decode 8|prefill (64|dense))|^(flashinfer|two-levels): decode 8|^sketch: (store|decode) 8"
    r"|^training: read blocks d64"
)


def machine_code(*arguments: str | Path, rc: int = 0) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, SCRIPT, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == rc, result.stdout + result.stderr
    return result.stdout


def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    output, changed = tmp_path / "a.json", tmp_path / "b.json"
    machine_code("--arch", "90", "--only", ONLY, "--output", output)
    result = json.loads(output.read_text())
    launches = [launch for step in result["launches"].values() for launch in step]
    files = (ROOT / "kernels").rglob("*.py")  # kernels of check_selector.py are no step of an engine
    source = "".join(path.read_text() for path in files if path.name != "check_selector.py")
    assert set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)) < {launch["kernel"] for launch in launches}
    result["launches"]["main: decode 8 rows"][0]["code"] |= {"digest": "0", "registers": 255}
    changed.write_text(json.dumps(result))
    said = machine_code("--compare", output, changed, rc=1)
    assert re.search(r"main: decode 8 rows: \w+_kernel 1: the code differs: .*registers \d+ -> 255", said), said
    assert f"1 of {len(launches)} launches differ" in said
