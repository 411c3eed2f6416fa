#!/usr/bin/env bash
# From text to a long-context model in ten minutes on two CPU cores, ending in a report.
#
#   bash examples/quickstart.sh
#
# Makes .venv on the first run, then: text that every Python has -> tokenizer -> token files ->
# three training stages of 512, 2,048 and 8,192 tokens on 2 processes that share each row (cp=2)
# -> Hugging Face folder -> evaluation with transformers -> runs/quickstart/report.html
#
# A second run reuses every step that is done; a change of a knob or of these scripts starts over.
#
# Environment
#   QUICKSTART_DIR=runs/quickstart  where everything goes (start over: remove it)
#   QUICKSTART_SIZE=full            full | tiny: a few steps at 64, 256 and 1,024 tokens, to try the path
#   QUICKSTART_PYTHON=              a python with lclm installed, used instead of making .venv
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh

out=${QUICKSTART_DIR:-runs/quickstart}
size=${QUICKSTART_SIZE:-full}
config=$out/quickstart.toml
overrides=()
case "$size" in
  full)
    lengths=(512 2048 8192) vocab=4096
    corpus_options=(--recall-tokens 600000)
    ;;
  tiny)
    lengths=(64 256 1024) vocab=1024
    corpus_options=(--recall-tokens 30000 --max-characters 500000)
    overrides=(model.vocab_size=1024 model.hidden_size=48 model.ffn_hidden_size=96)
    for stage in 0 1 2; do
      overrides+=("stage.$stage.seq_length=${lengths[$stage]}" "stage.$stage.tokens_per_step=1024"
                  "stage.$stage.tokens=4096")
    done
    overrides+=(stage.1.mixture.1.piece_length=64 stage.2.mixture.1.piece_length=64)
    ;;
  *)
    echo "error: QUICKSTART_SIZE=$size; use full or tiny" >&2
    exit 2
    ;;
esac

if [ -n "${QUICKSTART_PYTHON:-}" ]; then
  PATH="$(dirname "$QUICKSTART_PYTHON"):$PATH"
else
  base=$(find_python)
  prepare_environment .venv "$base" report "torch==2.13.0"
fi
export OMP_NUM_THREADS=1  # two processes, one core each

# What is there was made with these inputs, or goes.
inputs="$size $(cat examples/quickstart.sh examples/configs/quickstart.toml examples/quickstart/*.py | cksum)"
if [ "$(cat "$out/inputs" 2>/dev/null)" != "$inputs" ]; then
  rm -rf "$out"
  mkdir -p "$out/data"
  sed "s#runs/quickstart#$out#g" examples/configs/quickstart.toml > "$config"
  printf '%s\n' "$inputs" > "$out/inputs"
fi

# step NAME COMMAND...: runs the command, once for ever
step() {
  local name=$1 started=$SECONDS
  shift
  if [ -e "$out/done/$name" ]; then
    say "$name: done before"
    return 0
  fi
  say "$name"
  "$@"
  mkdir -p "$out/done"
  touch "$out/done/$name"
  say "$name: $((SECONDS - started)) s"
}

# tokens NAME INPUT [OPTION...]: text to $out/data/NAME.{bin,idx,json}
tokens() {
  step "tokens of $1" python tools/preprocess_data.py --input "$2" --output-prefix "$out/data/$1" \
    --tokenizer "$out/tokenizer" --append-eod --workers 2 "${@:3}"
}

corpus=$out/corpus
step "text" python examples/quickstart/make_corpus.py --output "$corpus" \
  --lengths "${lengths[@]}" "${corpus_options[@]}"
step "tokenizer" python tools/train_tokenizer.py --vocab-size "$vocab" --output "$out/tokenizer" \
  --group-by repo --input "$corpus/code" "$corpus/prose.jsonl" "$corpus/recall_${lengths[0]}.jsonl"
tokens code "$corpus/code" --group-by repo
tokens prose "$corpus/prose.jsonl"
tokens recall_near "$corpus/recall_near.jsonl"
tokens recall_short "$corpus/recall_${lengths[0]}.jsonl"
tokens recall_medium "$corpus/recall_${lengths[1]}.jsonl"
tokens recall_long "$corpus/recall_${lengths[2]}.jsonl"

train() {
  torchrun --standalone --nproc-per-node 2 -m lclm.train "$config" parallel.cp=2 \
    ${overrides[@]+"${overrides[@]}"}
}
step "training" train

# A checkpoint is written at the end of each stage; the first one is the model before the extension.
first_stage() {
  python tools/convert_to_hf.py --overwrite --output "$out/before_extension" \
    --checkpoint "$(ls -d "$out"/train/checkpoints/step_* | head -n 1)"
}
step "model before the extension" first_stage
step "model after the extension" python tools/convert_to_hf.py --overwrite \
  --checkpoint "$out/train/checkpoints" --output "$out/hf"
step "evaluation" python examples/quickstart/evaluate.py --before "$out/before_extension" \
  --after "$out/hf" --held-out "$corpus/held_out" --lengths "${lengths[@]}" \
  --output "$out/evaluation.json"
step "report" python examples/quickstart/report.py --run "$out/train" \
  --evaluation "$out/evaluation.json" --output "$out/report.html"
say "model: $out/hf   report: $out/report.html"
