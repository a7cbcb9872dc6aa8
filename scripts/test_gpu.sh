#!/usr/bin/env bash
# What continuous integration cannot run: kernel tests, the engine's and compute-sanitizer, side by side on one GPU.
# Writes a report (outcomes, versions, hardware) and fails if anything does. With 16 cores it takes under ten minutes.
# Needs pytest-xdist and compute-sanitizer.
#
#     scripts/test_gpu.sh benchmarks/results/tests_h200.json [processes for kernels] [processes for engines]
set -uo pipefail
cd "$(dirname "$0")/.."

report=${1:?name the file of the report}
python=${PYTHON:-python}
export PYTHON=$python OMP_NUM_THREADS=2 # the float64 reference: processes share the cores
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "needs a CUDA GPU" >&2; exit 1; }
"$python" -c 'import xdist' || { echo "needs pytest-xdist" >&2; exit 1; }
logs=$(mktemp -d)
echo "logs: $logs"
begin=$SECONDS
test_all() { # folder, processes
    "$python" -m pytest -v -m gpu -n "$2" --junitxml "$logs/$1.xml" "tests/$1" >"$logs/$1.log" 2>&1
}
test_all kernels "${2:-8}" &
kernels=$!
test_all engine "${3:-5}" &
engine=$!
status=0
scripts/sanitize.sh >"$logs/sanitize.log" 2>&1 || status=1
wait "$kernels" || status=1
wait "$engine" || status=1
for log in kernels engine sanitize; do tail -n 12 "$logs/$log.log"; done
"$python" - "$logs" "$report" "$((SECONDS - begin))" <<'PYTHON'
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

from spla_backend.evaluate.report import hardware, versions

logs, report = Path(sys.argv[1]), Path(sys.argv[2])
outcomes = {}
for file in ("kernels.xml", "engine.xml"):
    for case in ElementTree.parse(logs / file).iter("testcase"):
        kinds = {child.tag: child.get("message") for child in case if child.tag in ("failure", "error", "skipped")}
        outcome = ": ".join(part for pair in kinds.items() for part in pair if part) or "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome[:300]
sanitizer = [line for line in (logs / "sanitize.log").read_text().splitlines() if line.startswith("== ") or "SUMMARY" in line]
about = {
    "command": f"scripts/test_gpu.sh {report}",
    "versions": versions(),
    "hardware": hardware(),
    "seconds": int(sys.argv[3]),
    "passed": sum(outcome == "passed" for outcome in outcomes.values()),
    "outcomes": outcomes,
    "sanitizer": sanitizer,
}
report.write_text(json.dumps(about, indent=1) + "\n")
PYTHON
echo "report: $report"
exit $status
