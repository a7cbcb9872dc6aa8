#!/usr/bin/env bash
# From a fresh machine to an answer: set up .venv, make the model folder, run the offline example on it. Arguments go
# to examples/offline.py.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup_cpu.sh
model=$(.venv/bin/spla-model smollm2)
exec .venv/bin/python examples/offline.py --model "$model" "$@"
