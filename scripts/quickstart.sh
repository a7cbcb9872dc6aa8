#!/usr/bin/env bash
# From a fresh machine to an answer: set up .venv, make the model folder, run the offline example on it. Arguments go
# to examples/offline.py.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "quickstart: $*" >&2; }

say "1 of 3: the environment .venv (minutes the first time, mostly downloads; nothing when it is there)"
scripts/setup_cpu.sh
say "2 of 3: the model folder of SmolLM2-135M-Instruct (a download of about 100 MB the first time)"
model=$(.venv/bin/spla-model smollm2)
say "3 of 3: one question about a long text, with dense attention and with SPLA (two to five minutes)"
exec .venv/bin/python examples/offline.py --model "$model" "$@"
