#!/usr/bin/env bash
# Rollout servers of this machine, one per GPU (or SERVERS of them, each on TENSOR GPUs), on ports PORT, PORT + 1, ...:
#     export MEGATRON_DYPO_SERVER_TOKEN=$(openssl rand -hex 32)     # the same for servers and trainer
#     launch/servers.sh CONFIG [section.key=value ...]
# They listen on this machine only; for trainers on other machines: HOST=0.0.0.0. A server that dies is started again;
# all end with this script.
set -euo pipefail
: "${MEGATRON_DYPO_SERVER_TOKEN:?a secret that servers and trainer share (openssl rand -hex 32)}"
gpus=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)
tensor=${TENSOR:-1}
servers=${SERVERS:-$((gpus > 0 ? gpus / tensor : 1))}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # servers share the cores
trap 'trap - TERM; kill 0' EXIT INT TERM

keep_up() { # NUMBER ARGUMENTS...
    local number=$1 began code server
    shift
    trap 'kill -KILL -- "-$server" || true; exit 1' TERM
    if ((gpus > 0)); then
        export CUDA_VISIBLE_DEVICES=$(seq -s, $((number * tensor)) $(((number + 1) * tensor - 1)))
    fi
    while true; do
        began=$SECONDS code=0
        setsid python -m megatron_dypo serve "$@" --host "${HOST:-127.0.0.1}" --port $((${PORT:-8000} + number)) \
            --tensor "$tensor" &
        server=$!
        wait "$server" || code=$?
        kill -KILL -- "-$server" 2>/dev/null || true # a killed server leaves its engine behind, which holds the GPU
        if ((SECONDS - began < 60)); then return 1; fi # it cannot start
        echo "launch/servers.sh: server $number ended with code $code and is started again" >&2
    done
}
for ((i = 0; i < servers; i++)); do keep_up "$i" "$@" & done
wait -n || true
echo "launch/servers.sh: a server cannot start; all end" >&2
exit 1
