#!/usr/bin/env bash
# Set-up, then a Megatron-Core MoE learns from real text: two processes, on GPUs where there are any.
#
#   bash recipes/quickstart.sh                              about a minute on two CPU cores, after the set-up
#   bash recipes/quickstart.sh --set train.steps=50         arguments go to recipes/train_megatron.py (--help)
set -euo pipefail
cd "$(dirname "$0")/.."
DEEPEP_MOE_PACKAGES=recipes source environment.sh

gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
processes=$((gpus == 1 ? 1 : 2))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    recipes/train_megatron.py recipes/tiny.yaml "$@"
