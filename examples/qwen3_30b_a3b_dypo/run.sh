#!/usr/bin/env bash
# Servers first, on the node that samples; MEGATRON_DYPO_SERVER_TOKEN is the same on both nodes:
#     HOST=0.0.0.0 TENSOR=4 launch/servers.sh examples/qwen3_30b_a3b_dypo/config.yaml
# Then on the node that trains: HEAD=node0:29500 examples/qwen3_30b_a3b_dypo/run.sh [section.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
NNODES="${NNODES:-1}" exec launch/multi_node.sh examples/qwen3_30b_a3b_dypo/config.yaml "$@"
