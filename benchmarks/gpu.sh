#!/usr/bin/env bash
# Everything worth knowing of a GPU in nine minutes: benchmarks/gpu.sh [FOLDER] [OPTIONS of benchmarks.speed.gpu]
# FOLDER gets gpu.json, and gpu.log. PYTHON names the interpreter.
set -u
cd "$(dirname "$0")/.." || exit 1
folder=${1:-${OUT:-.}}
[ $# -gt 0 ] && shift
python=${PYTHON:-$(command -v python3 || command -v python)}
if [ -z "$python" ]; then
  echo "Missing: python."
  exit 1
fi
mkdir -p "$folder"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TRANSFORMERS_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
timeout --kill-after=5 540 "$python" -m benchmarks.speed.gpu --out "$folder/gpu.json" "$@" 2>&1 | tee "$folder/gpu.log"
exit "${PIPESTATUS[0]}"
