#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over a small decode, a verification step and a prefill: accesses out of bounds, races in
# shared memory. Needs a GPU and the CUDA toolkit. The first, plain run compiles the kernels and checks their numbers.
set -uo pipefail
cd "$(dirname "$0")/.."

sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
python=${PYTHON:-python}
export PYTHONPATH="$PWD:$PWD/tests/kernels${PYTHONPATH:+:$PYTHONPATH}"
cases=(decode decode-fp8 decode-scored-ahead decode-two-levels decode-sketches verify prefill prefill-fp8)
"$python" tests/kernels/sanitize.py "${cases[@]}" || exit 1
status=0
for tool in memcheck racecheck; do
    options=()
    # Libraries ask the driver for functions that it may not have, and go without.
    [ "$tool" = memcheck ] && options=(--report-api-errors no)
    # FlashAttention 3 waits at barriers that racecheck does not know, and is not ours.
    [ "$tool" = racecheck ] && options=(--kernel-name-exclude kernel_substring=flash)
    for case in "${cases[@]}"; do
        echo "== $tool $case"
        timeout 300 "$sanitizer" --tool "$tool" --error-exitcode 1 "${options[@]}" \
            "$python" tests/kernels/sanitize.py "$case" 2>&1 | tail -n "${LINES_SHOWN:-8}" || status=1
    done
done
exit $status
