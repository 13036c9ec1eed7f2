#!/usr/bin/env bash
# The study: CISPO against DAPO, GRPO and REINFORCE from one model, same problems, budget and updates, three seeds each.
#   train/studies/cispo/run.sh [FOLDER]     FOLDER: where the runs go, runs/study-cispo by default
# Stop it when you like: the same command skips what is finished and resumes what is not. The arms take turns, so that a
# study that is cut short has as many seeds of each.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
runs=${1:-runs/study-cispo}
train=${M1_TRAIN:-$here/../../../target/release/m1-train}
mkdir -p "$runs"

# The model of middling skill that all arms begin from: 450 steps of pretraining on conversations, loss on what the assistant
# says. It solves about a third of the study's problems.
if [ ! -e "$runs/start/model.safetensors" ]; then
  resume=; [ -d "$runs/start/checkpoints" ] && resume=--resume
  "$train" pretrain --out "$runs/start" --steps 450 --seed 11 --save-every 100 $resume
fi

all=()
for seed in 1 2 3; do
  for arm in cispo dapo grpo reinforce; do
    out=$runs/$arm-s$seed
    all+=("$out")
    [ -e "$out/model.safetensors" ] && continue
    if [ -d "$out/checkpoints" ]; then
      "$train" cispo --out "$out" --resume
    else
      "$train" cispo --model "$runs/start" --out "$out" --config "$here/study.toml" \
        --seed "$seed" --set "loss.algorithm=\"$arm\"" --set "name=\"$arm\""
    fi
  done
done
"$train" report "${all[@]}" --out "$here/report.html" --thresholds 0.4,0.5,0.6,0.7 \
  --title "CISPO, DAPO, GRPO and REINFORCE on six tasks"
