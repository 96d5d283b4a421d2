#!/usr/bin/env bash
# Servers first, on each of the 8 nodes that sample; MEGATRON_DYPO_SERVER_TOKEN is the same on all nodes:
#     HOST=0.0.0.0 TENSOR=8 launch/servers.sh examples/qwen3_235b_a22b_dypo/config.yaml
# Then the same line on the 8 that train: HEAD=node0:29500 examples/qwen3_235b_a22b_dypo/run.sh [section.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
NNODES="${NNODES:-8}" exec launch/multi_node.sh examples/qwen3_235b_a22b_dypo/config.yaml "$@"
