#!/usr/bin/env bash
# One node's part of a training run over several. Start it on every node, with the same values:
#
#   NODES=2 ENDPOINT=first-node:29500 bash recipes/multinode.sh recipes/qwen3_30b_a3b_like.yaml --output /shared/run
#
# ENDPOINT is a free port of one of the nodes; RANKS the processes of each node, by default one per GPU (without GPUs: 2).
# Arguments go to recipes/train_megatron.py (--help). Under SLURM: recipes/multinode.sbatch. More: docs/multinode.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${DEEPEP_MOE_PYTHON:-python}"
: "${NODES:?the number of nodes}" "${ENDPOINT:?host:port of one of the nodes}"
ranks="${RANKS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "$ENDPOINT" --rdzv-id "${RUN_ID:-deepep_moe}" \
    recipes/train_megatron.py "$@"
