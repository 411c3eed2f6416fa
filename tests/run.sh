#!/usr/bin/env bash
# Every test that this machine can run. Makes .venv on the first run, reuses it afterwards.
#
#   bash tests/run.sh          style, types and all tests but the long ones (under 15 min, 2 cores)
#   bash tests/run.sh quick    without those marked slow (under 3 min)
#   bash tests/run.sh long     those marked long
#   bash tests/run.sh py312    .venv312: Python 3.12, megatron-core 0.19, the tests of the trainer
#
# Further words go on to pytest: bash tests/run.sh quick -k rope
# Exit code 0 only if everything passed; pytest's summary is the last line.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh

suite=default
case "${1:--}" in
  quick | long | py312) suite=$1 && shift ;;
  -*) ;;
  *)
    echo "error: tests/run.sh: unknown suite '$1'; one of: quick, long, py312, or none" >&2
    exit 2
    ;;
esac

# Ranks are processes here: one thread each, or they fight for the cores.
export OMP_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1  # no test downloads a model

gpu="not gpu and "
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then gpu=""; fi

if [ "$suite" = py312 ]; then
  base=$(find_python312)
  prepare_environment .venv312 "$base" test "torch" "megatron-core>=0.19,<0.20"
  python -c 'import platform, torch, megatron.core as core
print("python", platform.python_version(), "torch", torch.__version__, "megatron-core", core.__version__)'
  exec python -m pytest -m "${gpu}not long" tests/train tests/checkpoint tests/hf "$@"
fi

base=$(find_python)
prepare_environment .venv "$base" dev "torch==2.13.0"

if [ "$suite" != long ]; then
  say "ruff check"
  ruff check --quiet .
  say "ruff format --check"
  ruff format --check --quiet .
  say "mypy"
  mypy
fi

case "$suite" in
  default) marks="${gpu}not long" ;;
  quick) marks="${gpu}not slow and not long" ;;
  long) marks="${gpu}long" ;;
esac
say "pytest -m \"$marks\""
exec python -m pytest -m "$marks" "$@"
