#!/usr/bin/env bash
# Set-up, then every test that applies to this machine. pytest's last lines list what was skipped: SKIPPED [count] and why.
#
#   bash tests/run.sh                 all
#   bash tests/run.sh -k combine      arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source environment.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

status=0
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
    ranks=$((gpus > 8 ? 8 : gpus < 2 ? 2 : gpus)) # two ranks can share one GPU
    echo "== GPU tests: $ranks ranks on $gpus GPUs"
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks" --local-ranks-filter 0 \
        -m pytest tests/gpu "$@" || status=$?
    echo "== CPU tests"
    CUDA_VISIBLE_DEVICES='' "$PYTHON" -m pytest tests/unit tests/distributed tests/emulation "$@" || status=$?
else
    # tests/gpu is collected too, so that what this machine cannot run is counted
    "$PYTHON" -m pytest tests "$@" || status=$?
fi
exit "$status"
