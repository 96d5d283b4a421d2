# shellcheck shell=bash
# Sourced by the scripts in this folder: the environment of every rank and server, and `--dry-run`.
# Variables that are already set are kept. Not set on purpose: NCCL's and Transformer Engine's own switches, whose
# defaults are right in the versions that requirements/ names (`trainer.deterministic` sets those that it needs), and
# PYTORCH_CUDA_ALLOC_CONF. Its expandable segments work with vLLM's sleep mode (`trainer.offload`), which disables them
# for its own memory; before vLLM 0.31 set them under this name, not as PYTORCH_ALLOC_CONF (docs/rollout.md).

settings=(
    CUDA_DEVICE_MAX_CONNECTIONS=1 # kernels start in issue order: communication before the matmul that hides it
    OMP_NUM_THREADS=1 # ranks and servers share the cores
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800 # s that torchrun gives its ranks to step and save when stopped (default 30)
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new store at every restart, announced to all: a node may come back
)

dry_run=no
if [ "${1-}" = --dry-run ]; then
    dry_run=yes
    shift
fi

quote() { # WORDS...: print one line of shell, quoted where needed
    local word line=()
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=("$word"); else line+=("${word@Q}"); fi
    done
    echo "${line[*]}"
}

default() { # NAME=VALUE: export it unless NAME is set
    local name=${1%%=*}
    if [ -z "${!name+set}" ]; then export "${1?}"; fi
    if [ "$dry_run" = yes ]; then quote export "$name=${!name}"; fi
}

run() { # COMMAND...: exec it, or print it in a dry run
    if [ "$dry_run" = no ]; then exec "$@"; fi
    quote "$@"
}

start_ranks() { # TORCHRUN'S OPTIONS... -m megatron_dypo ...: by default Slurm's SIGUSR1 would kill torchrun
    run torchrun --nproc-per-node "$(ranks_here)" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$@"
}

ranks_here() { # NPROC, or one per GPU, or one
    local gpus
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)
    echo "${NPROC:-$((gpus > 0 ? gpus : 1))}"
}

for setting in "${settings[@]}"; do default "$setting"; done
