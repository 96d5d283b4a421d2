#!/usr/bin/env bash
# The same command on every node: NNODES=4 HEAD=host0:29500 launch/multi_node.sh CONFIG [section.key=value ...]
# The run folder must be on a file system that all nodes see.
set -euo pipefail
: "${NNODES:?number of nodes}" "${HEAD:?host:port of the first node}"
gpus=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)
export CUDA_DEVICE_MAX_CONNECTIONS=1 # lets tensor-parallel communication overlap as Megatron schedules it
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks share the cores
exec torchrun --nnodes "$NNODES" --nproc-per-node "${NPROC:-$((gpus > 0 ? gpus : 1))}" --rdzv-id "${JOB_ID:-megatron_dypo}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" -m megatron_dypo train "$@"
