#!/usr/bin/env bash
# Rollout servers of this machine, one per GPU (or SERVERS of them, each on TENSOR GPUs), on ports PORT, PORT + 1, ...:
#     export MEGATRON_DYPO_SERVER_TOKEN=$(openssl rand -hex 32)     # the same for servers and trainer
#     launch/servers.sh [--dry-run] CONFIG [section.key=value ...]
# They listen on this machine only; for trainers on other machines: HOST=0.0.0.0. CUDA_VISIBLE_DEVICES selects the GPUs
# (default: all). A server that dies is restarted; one that fails to start ATTEMPTS times in a row (default 3) is given
# up, and the others continue. All of them end with this script, which ends when none is left.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ "$dry_run" = yes ] || : "${MEGATRON_DYPO_SERVER_TOKEN:?a secret that servers and trainer share (openssl rand -hex 32)}"
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}"
tensor=${TENSOR:-1}
servers=${SERVERS:-$((${#gpus[@]} > 0 ? ${#gpus[@]} / tensor : 1))}
devices() { # NUMBER: the GPUs of that server, if any
    IFS=,
    echo "${gpus[*]:$1 * tensor:tensor}"
}

command_of() { # NUMBER ARGUMENTS...: store that server's command in `command`
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

answers() { # NUMBER: test whether that server responds
    local host=${HOST:-127.0.0.1} status
    if [ "$host" = 0.0.0.0 ]; then host=127.0.0.1; fi
    # shellcheck disable=SC2016 # its own arguments
    status=$(timeout 5 bash -c 'exec 3<>"/dev/tcp/$0/$1" && printf "GET /health HTTP/1.0\r\n\r\n" >&3 && head -n 1 <&3' \
        "$host" $((${PORT:-8000} + $1)) 2>/dev/null) || true
    [[ $status == *" 200 "* ]]
}

keep_up() { # NUMBER ARGUMENTS...: run that server, and restart it when it ends
    local number=$1 server='' code failed=0
    shift
    trap - EXIT
    trap '[ -z "$server" ] || kill -KILL -- "-$server" 2>/dev/null; exit 143' TERM
    if ((${#gpus[@]} > 0)); then
        CUDA_VISIBLE_DEVICES=$(devices "$number")
        export CUDA_VISIBLE_DEVICES
    fi
    command_of "$number" "$@"
    while ((failed < ${ATTEMPTS:-3})); do
        setsid "${command[@]}" &
        server=$! code=0 failed=$((failed + 1))
        while kill -0 "$server" 2>/dev/null; do
            if ((failed > 0)) && answers "$number"; then failed=0; fi
            sleep 1
        done
        wait "$server" || code=$?
        kill -KILL -- "-$server" 2>/dev/null || true # a killed server leaves its engine running, which holds the GPU
        if ((failed > 0 && code == 2)); then break; fi # it has printed what is wrong; waiting does not help
        echo "launch/servers.sh: server $number ended with code $code and is restarted" >&2
        sleep $((failed > 0 ? 10 : 1))
    done
    echo "launch/servers.sh: server $number cannot start (exit code $code) and is given up" >&2
}
for ((i = 0; i < servers; i++)); do keep_up "$i" "$@" & done
wait
echo "launch/servers.sh: no server is left" >&2
exit 1
