#!/usr/bin/env bash
# One system on the quickstart's task, on 2 CPU ranks, from the weights that all systems start from (made when they are
# not there yet): examples/systems/run.sh SYSTEM [section.key=value ...]
#     examples/systems/run.sh luffy; examples/systems/run.sh chord
#     python -m megatron_dypo report runs/systems/luffy runs/systems/chord
# SYSTEM is a file of examples/systems/quickstart: its recipe, laid over the quickstart's configuration. The published
# setting of each system is examples/systems/SYSTEM.yaml (docs/systems.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
PATH="$PWD/${VENV:-.venv}/bin:$PATH"
here=examples/systems/quickstart
systems="$(cd $here && for file in *.yaml; do echo -n "${file%.yaml} "; done)"
systems="${systems/common /}"
systems="${systems/warm_start /}"
system="${1-}"
if [[ -z $system || " $systems" != *" $system "* ]]; then
    echo "run.sh: SYSTEM is one of: $systems" >&2
    exit 2
fi
shift

train() { # FILE.yaml and section.key=value ...: over the quickstart's configuration
    torchrun --rdzv-backend loopback --rdzv-endpoint localhost --nproc-per-node 2 \
        -m megatron_dypo train examples/quickstart/config.yaml "$@"
}

start=runs/systems/warm_start
if [ ! -d $start/model ]; then
    train $here/warm_start.yaml
    python -m megatron_dypo convert export --checkpoint $start --out $start/model
fi
train $here/common.yaml "$here/$system.yaml" "trainer.run_dir=runs/systems/$system" "$@"
