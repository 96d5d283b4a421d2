#!/usr/bin/env bash
# The same line on both nodes: HEAD=node0:29500 examples/qwen2.5_math_7b_sft_rl/run.sh [section.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
NNODES="${NNODES:-2}" exec launch/multi_node.sh examples/qwen2.5_math_7b_sft_rl/config.yaml "$@"
