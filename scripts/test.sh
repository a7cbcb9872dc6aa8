#!/usr/bin/env bash
# Set up .venv, then lint, check types and run the tests; fails if any of them does. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

unset PYTHONDONTWRITEBYTECODE # tests start tens of processes; each would compile vLLM's modules anew, 10 s and more
scripts/setup_cpu.sh
source .venv/bin/activate
status=0
if ! (($#)); then
    # Kernel tests in a process of their own: Triton must know that it interprets before vLLM imports it. Beside all
    # else, with some of the algorithm's, so that both take as long; what it says comes at the end. One thread each:
    # threads that wait for one another on a core that is busy with the other process take ten times as long.
    export OMP_NUM_THREADS=1
    log=$(mktemp)
    beside=(tests/kernels tests/algorithm/test_sequence.py tests/algorithm/test_tiles.py)
    pytest --durations=20 "${beside[@]}" >"$log" 2>&1 &
    kernels=$!
    trap 'kill "$kernels" 2>/dev/null || true; rm -f "$log"' EXIT
fi
ruff check . || status=1
ruff format --check . || status=1
mypy || status=1
if (($#)); then
    pytest "$@" || status=1
else
    pytest --durations=20 "${beside[@]/#/--ignore=}" || status=1
    wait "$kernels" || status=1
    cat "$log"
fi
exit $status
