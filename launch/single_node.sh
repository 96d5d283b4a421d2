#!/usr/bin/env bash
# All GPUs of this machine (or NPROC ranks): launch/single_node.sh CONFIG [section.key=value ...]
# Rendezvous `loopback` (megatron_dypo must be installed): as --standalone, but nothing is reached from other machines.
set -euo pipefail
gpus=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)
export CUDA_DEVICE_MAX_CONNECTIONS=1 # lets tensor-parallel communication overlap as Megatron schedules it
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks share the cores
exec torchrun --rdzv-backend loopback --rdzv-endpoint localhost --nproc-per-node "${NPROC:-$((gpus > 0 ? gpus : 1))}" -m megatron_dypo train "$@"
