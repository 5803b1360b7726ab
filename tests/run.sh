#!/usr/bin/env bash
# Set-up, then every test that applies to this machine. Says what it left out and why.
#
#   bash tests/run.sh                 all
#   bash tests/run.sh -k combine      arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source environment.sh
unset DEEPEP_MOE_PYTHON DEEPEP_MOE_CUDA # of the set-up; what is left are settings of the dispatcher
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

left_out=()
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
status=0

# GPU tests first: the closing lines at the end of the output are then those of the larger run
gpu_files=$(find tests/gpu -name 'test_*.py' 2>/dev/null | sort)
if [ -z "$gpu_files" ]; then
    :
elif [ "$gpus" -gt 0 ]; then
    ranks=$((gpus > 8 ? 8 : gpus))
    echo "== tests/gpu: $ranks ranks on $gpus GPUs"
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks" --local-ranks-filter 0 \
        -m pytest tests/gpu "$@" || status=$?
else
    count=$(grep -hcE '^ *def test_' $gpu_files | paste -sd+ - | xargs -I{} bash -c 'echo $(({}))')
    left_out+=("tests/gpu ($count test functions): torch sees no CUDA GPU")
fi

# these are about CPU tensors and gloo, also where there are GPUs
echo "== tests/unit, tests/distributed"
CUDA_VISIBLE_DEVICES='' "$PYTHON" -m pytest tests/unit tests/distributed "$@" || status=$?

if [ ${#left_out[@]} -gt 0 ]; then
    echo "Left out on this machine, besides the skips that pytest lists above:"
    printf '  %s\n' "${left_out[@]}"
fi
exit "$status"
