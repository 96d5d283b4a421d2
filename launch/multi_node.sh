#!/usr/bin/env bash
# The same command on every node: NNODES=4 HEAD=host0:29500 launch/multi_node.sh [--dry-run] CONFIG [section.key=value ...]
# The run folder must be on a file system that all nodes see.
#     NPROC         ranks of this node (default: one per GPU)
#     MAX_RESTARTS  how often this node's ranks restart, from the newest checkpoint, after any rank of the job has
#                   ended (default 3); a node that was restarted meanwhile joins again
#     JOIN_SECONDS  how long the nodes wait for each other, at the start and at a restart (default 1800)
#     LOCAL_ADDR    this node's address, if other nodes cannot resolve its host name
#     JOB_ID        a name, if jobs share HEAD's port
# SIGTERM or SIGUSR1 on any node ends all ranks after finishing the step and saving (docs/launch.md).
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
: "${NNODES:?number of nodes}" "${HEAD:?host:port of the first node}"
if [ "$dry_run" = no ]; then python -m megatron_dypo.runtime.rendezvous_check "$HEAD"; fi
meeting="join_timeout=${JOIN_SECONDS:-1800}"
address=()
if [ -n "${LOCAL_ADDR-}" ]; then
    address=(--local-addr "$LOCAL_ADDR")
    # torchrun hosts the store if HEAD names this machine, but may not know all its addresses.
    if [ "${HEAD%:*}" = "$LOCAL_ADDR" ]; then meeting+=,is_host=1; fi
fi
start_ranks --nnodes "$NNODES" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-id "${JOB_ID:-megatron_dypo}" --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-conf "$meeting" \
    "${address[@]}" -m megatron_dypo train "$@"
