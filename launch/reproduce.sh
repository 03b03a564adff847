#!/usr/bin/env bash
# One of the paper's experiments on text, from files to the table:
#   launch/reproduce.sh RECIPE TOKENIZER TRAIN VALIDATION TEST OUTPUT [option of ecp-pretrain ...]
#   launch/reproduce.sh wikitext-103-release wordpiece:vocab.txt wiki.train.raw wiki.valid.raw wiki.test.raw paper
# RECIPE and TOKENIZER are those of ecp-preprocess; the preset is paper-12l unless an option names another. With another
# tokenizer than bert-base-cased's add --model.vocab_size null. GPUS is the number of ranks (default 1). What is done is
# not done again: the same command goes on after a crash.
set -euo pipefail
if (($# < 6)); then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
recipe=$1 tokenizer=$2 train=$3 validation=$4 test=$5 output=$6
shift 6
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
if ! "$python" -c "import ecp_scale" 2>/dev/null; then
    echo "error: $python has no ecp_scale: make install && . .venv/bin/activate" >&2
    exit 2
fi

for split in train validation test; do
    "$python" "$here/data_tools/preprocess.py" --recipe "$recipe" --input "${!split}" --tokenizer "$tokenizer" \
        --output-prefix "$output/shards/$split" --workers "${WORKERS:-1}"
done

options=(--config paper-12l --data.prefix "$output/shards/train" --data.validation_prefix "$output/shards/validation"
    --training.output_dir "$output/run" --resume auto "$@")
if ((${GPUS:-1} > 1)); then
    "$(dirname "$(command -v "$python")")/deepspeed" --num_gpus "$GPUS" "$here/launch/pretrain_ecp.py" "${options[@]}"
else
    "$python" "$here/launch/pretrain_ecp.py" "${options[@]}"
fi

if [[ -e $output/run/stopped.json ]]; then
    echo "the training was stopped before its end; the same command goes on there" >&2
    exit 1
fi

rm -rf "$output/model"
"$python" "$here/launch/convert_checkpoint.py" --checkpoint "$output/run" --output "$output/model"
for protocol in release sliding; do
    "$python" "$here/launch/evaluate.py" --model "$output/model" --data "$output/shards/test" --protocol "$protocol" \
        --json "$output/$protocol.json"
done

"$python" - "$output" <<'EOF' | tee "$output/table.md"
import json, pathlib, sys

columns = ("token_perplexity", "word_perplexity", "word_and_line_end_perplexity", "bits_per_byte", "tokens_per_word")
print("| protocol | " + " | ".join(name.replace("_", " ") for name in columns) + " |")
print("|---" + "|---:" * len(columns) + "|")
for protocol in ("release", "sliding"):
    found = json.loads((pathlib.Path(sys.argv[1]) / f"{protocol}.json").read_text())
    print(f"| {protocol} | " + " | ".join("-" if found[name] is None else f"{found[name]:.4f}" for name in columns) + " |")
EOF
