#!/usr/bin/env bash
# tests/peers/run.sh [nano] [small] [base] [-- FLAGS OF compare.py]: installs the peers, makes the checkpoints, measures ours and theirs in
# turn, appends to results.jsonl here and prints the table. See README.md.
set -euo pipefail
cd "$(dirname "$0")"
here=$PWD
home=${M1_PEERS_HOME:-$HOME/.cache/m1-peers}
sizes=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do sizes+=("$1"); shift; done
[ "${1:-}" = -- ] && shift
[ ${#sizes[@]} -gt 0 ] || sizes=(nano small base)
mkdir -p "$home/models"
export PYTHONDONTWRITEBYTECODE=1

say() { printf '== %s\n' "$*" >&2; }
python=${M1_PEERS_PYTHON:-$home/venv/bin/python}
if [ ! -x "$python" ]; then
  say "Python packages of requirements.txt into $home/venv"
  python3 -m venv "$home/venv"
  "$home/venv/bin/pip" install -q -r requirements.txt
fi
libraries=${M1_PEERS_LLAMA:-$home/node_modules}
if [ ! -d "$libraries" ]; then
  say "llama.cpp of package.json into $home/node_modules"
  cp package.json "$home/"
  (cd "$home" && npm install --silent >&2)
fi
say "m1 and m1-train"
target=${CARGO_TARGET_DIR:-$here/../../target}
(cd ../.. && cargo build --release -p m1-infer -p m1-train --bins >&2)
models=${M1_PEERS_MODELS:-$home/models}
[ "$models/machine" -nt machine.rs ] || rustc -O --edition 2024 -C target-cpu=native machine.rs -o "$models/machine"
for size in nano "${sizes[@]}"; do
  for dtype in f32 bf16; do
    [ -e "$models/$size-$dtype/config.json" ] || { say "$size-$dtype"; "$python" checkpoint.py "$size" "$dtype" "$models/$size-$dtype"; }
  done
  for type in f32 bf16 q8_0 q4_0; do
    [ -e "$models/$size-$type.gguf" ] || { say "$size-$type.gguf"; "$python" gguf_of.py "$models/$size-f32" "$models/$size-$type.gguf" "$type"; }
  done
done
say "do the peers compute the same model?"
"$python" check.py "$target/release/m1" "$libraries" "$models"
say "measuring"
"$python" compare.py "${sizes[@]}" --m1 "$target/release" --models "$models" --libraries "$libraries" --results "$here/results.jsonl" "$@"
"$python" table.py results.jsonl
