#!/usr/bin/env bash
# All GPUs of this machine (or NPROC ranks): launch/single_node.sh [--dry-run] CONFIG [section.key=value ...]
# Rendezvous `loopback` (megatron_dypo must be installed): like --standalone, but unreachable from other machines.
# SIGTERM or SIGUSR1 ends it after finishing the step and saving; the same command resumes (docs/launch.md).
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
start_ranks --rdzv-backend loopback --rdzv-endpoint localhost \
    --max-restarts "${MAX_RESTARTS:-0}" -m megatron_dypo train "$@"
