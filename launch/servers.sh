#!/usr/bin/env bash
# Rollout servers of this machine, one per GPU (or SERVERS of them, each on TENSOR GPUs), on ports PORT, PORT + 1, ...:
#     export MEGATRON_DYPO_SERVER_TOKEN=$(openssl rand -hex 32)     # the same for servers and trainer
#     launch/servers.sh [--dry-run] CONFIG [section.key=value ...]
# They listen on this machine only; for trainers on other machines: HOST=0.0.0.0. CUDA_VISIBLE_DEVICES says which GPUs
# (default: all). A server that dies is started again; all end with this script.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ "$dry_run" = yes ] || : "${MEGATRON_DYPO_SERVER_TOKEN:?a secret that servers and trainer share (openssl rand -hex 32)}"
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}"
tensor=${TENSOR:-1}
servers=${SERVERS:-$((${#gpus[@]} > 0 ? ${#gpus[@]} / tensor : 1))}
devices() { # NUMBER: of that server, where there are GPUs
    IFS=,
    echo "${gpus[*]:$1 * tensor:tensor}"
}

command_of() { # NUMBER ARGUMENTS...: that server's command, in `command`
    command=(python -m megatron_dypo serve "${@:2}" --host "${HOST:-127.0.0.1}" --port $((${PORT:-8000} + $1)) --tensor "$tensor")
}

if [ "$dry_run" = yes ]; then
    for ((i = 0; i < servers; i++)); do
        command_of "$i" "$@"
        if ((${#gpus[@]} > 0)); then command=("CUDA_VISIBLE_DEVICES=$(devices "$i")" "${command[@]}"); fi
        quote "${command[@]}"
    done
    exit
fi

trap 'trap - TERM; kill $(jobs -p) 2>/dev/null || true; wait' EXIT
trap 'exit 143' INT TERM

keep_up() { # NUMBER ARGUMENTS...
    local number=$1 began code server='' started=no
    shift
    trap - EXIT
    trap '[ -z "$server" ] || kill -KILL -- "-$server" 2>/dev/null; exit 143' TERM
    if ((${#gpus[@]} > 0)); then
        CUDA_VISIBLE_DEVICES=$(devices "$number")
        export CUDA_VISIBLE_DEVICES
    fi
    command_of "$number" "$@"
    while true; do
        began=$SECONDS code=0
        setsid "${command[@]}" &
        server=$!
        wait "$server" || code=$?
        kill -KILL -- "-$server" 2>/dev/null || true # a killed server leaves its engine behind, which holds the GPU
        if ((SECONDS - began >= 60)); then
            started=yes
        elif [ "$started" = no ]; then
            return 1 # it cannot start
        else
            sleep 10
        fi
        echo "launch/servers.sh: server $number ended with code $code and is started again" >&2
    done
}
for ((i = 0; i < servers; i++)); do keep_up "$i" "$@" & done
wait -n || true
echo "launch/servers.sh: a server cannot start; all end" >&2
exit 1
