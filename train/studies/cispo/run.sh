#!/usr/bin/env bash
# The study: CISPO against DAPO, GRPO and REINFORCE from m1-nano as it was before its own reinforcement learning (start/),
# same problems, budget and updates, three seeds each.
#   train/studies/cispo/run.sh [FOLDER]     FOLDER: where the runs go, runs/study-cispo by default
# Stop it when you like: the same command skips what is finished and resumes what is not. The arms take turns, so that a
# study that is cut short has as many seeds of each.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
runs=${1:-runs/study-cispo}
train=$(realpath "${M1_TRAIN:-$here/../../../target/release/m1-train}")
mkdir -p "$runs"
cd "$runs" # the page names runs as they are given: by their own names, on whatever machine

all=()
for seed in 1 2 3; do
  for arm in cispo dapo grpo reinforce; do
    out=$arm-s$seed
    all+=("$out")
    [ -e "$out/model.safetensors" ] && continue
    if [ -d "$out/checkpoints" ]; then
      "$train" cispo --out "$out" --resume
    else
      "$train" cispo --model "$here/start" --out "$out" --config "$here/study.toml" \
        --seed "$seed" --set "loss.algorithm=\"$arm\"" --set "name=\"$arm\""
    fi
  done
done
"$train" report "${all[@]}" --out "$here/report.html" --thresholds 0.3,0.35,0.4,0.45 \
  --title "CISPO, DAPO, GRPO and REINFORCE on three tasks"
