#!/usr/bin/env bash
# Set up .venv, then lint, check types and run the tests; fails if any of them does. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup_cpu.sh
source .venv/bin/activate
status=0
ruff check . || status=1
ruff format --check . || status=1
mypy || status=1
if (($#)); then
    pytest "$@" || status=1
else
    # In a process of their own: Triton must know that it interprets before vLLM imports it.
    pytest tests/kernels || status=1
    pytest --ignore=tests/kernels || status=1
fi
exit $status
