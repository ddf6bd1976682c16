#!/usr/bin/env bash
# The whole chain as dependent jobs: audio -> shards -> pretraining -> rounds of labels and pretraining
# -> exported model -> SUPERB -> report. Run it again at any time: it submits only stages that are not done or queued.
#
#   bash slurm/pipeline.sh [--dry-run] SETTINGS
#
# SETTINGS is a file of shell variables:
#
#   WORK=/data/me/first            # everything goes here: shards, run-0, labels-1, run-1, model, superb, logs
#   SOURCES="/data/librispeech/train.jsonl"
#   TOKENIZE="--tasks 200 --codec encodec_24khz"     # options of tokenize.sbatch
#   PRETRAIN="codec2vec_base_codes"                  # config and options of the first pretraining
#   ROUNDS=2                       # of labels and pretraining; 0: none
#   LABEL="--layer 6 --clusters 500"                 # options of label.sbatch
#   PRETRAIN_LABELS="codec2vec_base_labels"          # config and options of the other pretrainings
#   SUPERB="--tasks ks,sid,er,ic --lr 1e-3,1e-4 --data /data/superb --budget full"
#
# Site settings are in site.sh. A stage whose settings changed after it was done is refused, not run again.
set -euo pipefail
script=$0
here=$(cd "$(dirname "$script")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"
parse "$@"
[ ${#rest[@]} = 1 ] || { usage >&2 && exit 2; }
[ -f "${rest[0]}" ] || die "${rest[0]}: no such file; write the settings there (--help shows them)"
WORK="" SOURCES="" TOKENIZE="" PRETRAIN="" ROUNDS=0 LABEL="" PRETRAIN_LABELS="" SUPERB=""
# shellcheck source=/dev/null
source "${rest[0]}"
for needed in WORK SOURCES PRETRAIN SUPERB; do [ -n "${!needed}" ] || die "${rest[0]}: does not set $needed" 2; done
[ "$ROUNDS" = 0 ] || [ -n "$PRETRAIN_LABELS" ] || die "${rest[0]}: ROUNDS is $ROUNDS, but PRETRAIN_LABELS is not set" 2
WORK=$(realpath -m "$WORK")
id=$(cksum <<<"$WORK" | cut -d ' ' -f 1)
submitted=0

# queued STAGE: the number of its last job that has not ended.
queued() {
    squeue -h -u "$(id -un)" -o '%A %j' 2>/dev/null | awk -v name="codecssl-$id-$1" '
        $2 == name || $2 == name "-finish" || $2 == name "-report" { if ($1 > last) last = $1 }
        END { if (last) print last }' || true
}

# stage NAME AFTER SCRIPT ARGUMENT...: sets `job` to the last job of the stage, or to nothing if the stage is done.
stage() {
    local name=$1 before=$2 file=$3 mark=$WORK/done/$1
    shift 3
    local said="$file $*"
    job=""
    if [ -e "$mark.settings" ] && [ "$(cat "$mark.settings")" != "$said" ]; then
        die "$mark.settings: stage $name was begun with '$(cat "$mark.settings")', now it is '$said'; take another WORK"
    fi
    if [ -e "$mark" ]; then
        say "$name: done"
        return
    fi
    job=$(queued "$name")
    if [ -n "$job" ]; then
        say "$name: job $job is queued or runs"
        return
    fi
    job=$(CODECSSL_LOGS=$WORK/logs bash "$here/$file" ${own[dry-run]:+--dry-run} --name "codecssl-$id-$name" \
        --done "$mark" ${before:+--after "$before"} "$@" | tail -n 1)
    submitted=$((submitted + 1))
    say "$name: job $job"
    [ -n "${own[dry-run]}" ] || { mkdir -p "$WORK/done" && printf '%s\n' "$said" >"$mark.settings"; }
}

read -ra sources <<<"$SOURCES"
read -ra tokenize <<<"$TOKENIZE"
read -ra pretrain <<<"$PRETRAIN"
read -ra label <<<"$LABEL"
read -ra pretrain_labels <<<"$PRETRAIN_LABELS"
read -ra superb <<<"$SUPERB"

stage shards "" tokenize.sbatch "${tokenize[@]}" "${sources[@]}" --output "$WORK/shards"
shards=$job
stage run-0 "$shards" pretrain.sbatch "${pretrain[@]}" --data "$WORK/shards" --output "$WORK/run-0"
for ((round = 1; round <= ROUNDS; round++)); do
    stage "labels-$round" "$job" label.sbatch "$WORK/run-$((round - 1))" --data "$WORK/shards" "${label[@]}" \
        --output "$WORK/labels-$round"
    stage "run-$round" "$job" pretrain.sbatch "${pretrain_labels[@]}" --data "$WORK/shards" \
        "--data.labels=['$WORK/labels-$round']" --output "$WORK/run-$round"
done
stage model "$job" export.sbatch "$WORK/run-$ROUNDS" --output "$WORK/model"
stage superb "$job" superb.sbatch --upstream "$WORK/model" "${superb[@]}" --output "$WORK/superb"
say "$submitted stages submitted; the report: $WORK/superb/report.html"
