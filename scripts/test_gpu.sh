#!/usr/bin/env bash
# What continuous integration cannot run: kernel tests in several processes, the engine's, compute-sanitizer. Writes a
# report (outcomes, versions, hardware) and fails if anything does.
#
#     scripts/test_gpu.sh benchmarks/results/tests_h200.json [processes]
set -uo pipefail
cd "$(dirname "$0")/.."

report=${1:?name the file of the report}
processes=${2:-8}
python=${PYTHON:-python}
export PYTHON=$python OMP_NUM_THREADS=2 # the float64 reference: processes share the cores
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "needs a CUDA GPU" >&2; exit 1; }
logs=$(mktemp -d)
status=0
"$python" -m pytest -m gpu -n "$processes" --junitxml "$logs/kernels.xml" tests/kernels || status=1
"$python" -m pytest -m gpu --junitxml "$logs/engine.xml" tests/engine || status=1
scripts/sanitize.sh | tee "$logs/sanitize.log" || status=1
"$python" - "$logs" "$report" <<'PYTHON'
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

from spla_backend.evaluate.report import hardware, versions

logs, report = Path(sys.argv[1]), Path(sys.argv[2])
outcomes = {}
for file in ("kernels.xml", "engine.xml"):
    for case in ElementTree.parse(logs / file).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
sanitizer = [line for line in (logs / "sanitize.log").read_text().splitlines() if line.startswith("== ") or "SUMMARY" in line]
command = f"scripts/test_gpu.sh {report}"
about = {"command": command, "versions": versions(), "hardware": hardware(), "outcomes": outcomes, "sanitizer": sanitizer}
report.write_text(json.dumps(about, indent=1) + "\n")
PYTHON
echo "logs: $logs, report: $report"
exit $status
