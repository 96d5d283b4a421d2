#!/usr/bin/env bash
# All GPUs of this machine (or NPROC ranks): launch/single_node.sh [--dry-run] CONFIG [section.key=value ...]
# Rendezvous `loopback` (megatron_dypo must be installed): as --standalone, but nothing is reached from other machines.
# SIGTERM or SIGUSR1 ends it after the step and a save; the same command goes on from there (docs/launch.md).
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
start_ranks --rdzv-backend loopback --rdzv-endpoint localhost \
    --max-restarts "${MAX_RESTARTS:-0}" -m megatron_dypo train "$@"
