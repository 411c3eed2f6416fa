#!/usr/bin/env bash
# ProLong's continued pre-training, 64K then 512K tokens: examples/configs/prolong.toml
#
#   bash examples/pretrain_prolong.sh [key=value ...]                        starts NPROC processes here
#   torchrun --no-python --nproc-per-node 8 examples/pretrain_prolong.sh [key=value ...]
#   torchrun --nproc-per-node 8 -m lclm.train examples/configs/prolong.toml [key=value ...]
#
#   SCALE=full   the real configuration (default)
#   SCALE=tiny   the same shape for a CPU: makes its data on the first run, takes about a minute
#   NPROC=n      processes on this machine (default: its GPUs, or 1); not used under torchrun
#
# Arguments go on to lclm.train (see --help there). Uses the python and torchrun on PATH.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scale=${SCALE:-full}

# Text, tokenizer and token files of the tiny run, under ./data/prolong_tiny. Made beside and renamed,
# so that what is there is whole.
prepare_tiny_data() {
  local target=data/prolong_tiny work=data/prolong_tiny.tmp-$$
  [ -d "$target" ] && return
  echo "preparing $target (once)" >&2
  rm -rf "$work" && mkdir -p "$work"
  trap 'rm -rf "$work"' EXIT
  # One chain: a step that fails stops the rest, and the log says why.
  {
    python "$root/examples/quickstart/make_corpus.py" --output "$work/text" --lengths 512 4096 \
      --recall-tokens 8192 --max-characters 2000000 &&
    python "$root/tools/train_tokenizer.py" --vocab-size 2048 --output "$work/tokenizer" \
      --group-by repo --input "$work/text/code" "$work/text/prose.jsonl" &&
    python "$root/tools/preprocess_data.py" --input "$work/text/code" --group-by repo \
      --output-prefix "$work/code" --tokenizer "$work/tokenizer" --append-eod &&
    python "$root/tools/preprocess_data.py" --input "$work/text/prose.jsonl" \
      --output-prefix "$work/prose" --tokenizer "$work/tokenizer" --append-eod
  } >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 2; }
  mv "$work" "$target"
  trap - EXIT
}

# The other local ranks wait until local rank 0 has the data; torchrun stops them if it fails.
wait_for_tiny_data() {
  local waited=0
  until [ -d data/prolong_tiny ]; do
    sleep 1
    waited=$((waited + 1))
    [ "$waited" -lt 600 ] || { echo "error: no data/prolong_tiny after 600 s" >&2; exit 2; }
  done
}

case $scale in
  full) config=$root/examples/configs/prolong.toml ;;
  tiny)
    config=$root/examples/configs/prolong_tiny.toml
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    if [ "${LOCAL_RANK:-0}" = 0 ]; then prepare_tiny_data; else wait_for_tiny_data; fi
    ;;
  *) echo "error: SCALE=$scale; use full or tiny" >&2; exit 2 ;;
esac

if [ -n "${RANK:-}" ]; then
  exec python -m lclm.train "$config" "$@"
fi
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
exec torchrun --standalone --nproc-per-node "$nproc" -m lclm.train "$config" "$@"
