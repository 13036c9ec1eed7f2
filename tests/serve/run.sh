#!/usr/bin/env bash
# tests/serve/run.sh [--long] [--only api|page|load]: tests `m1 serve` as it is used: OpenAI's Python package, a browser,
# many clients at once. A line for each check; exit status 1 if any fails. --long is load for five minutes. M1 names the
# binary; without it cargo builds one. Python packages go to ~/.cache/m1-serve (M1_SERVE_HOME).
set -uo pipefail
cd "$(dirname "$0")"
home=${M1_SERVE_HOME:-$HOME/.cache/m1-serve}
model=${M1_SERVE_MODEL:-../../examples/m1-nano}
seconds=20 minutes=10 only=
while [ $# -gt 0 ]; do
  case $1 in
    --long) seconds=300 minutes=25 ;;
    --only) shift; only=${1:?--only api, page or load} ;;
    *) echo "unknown argument: $1" >&2; exit 2 ;;
  esac
  shift
done
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
unset http_proxy HTTP_PROXY all_proxy ALL_PROXY

if [ -z "${M1:-}" ]; then
  (cd ../.. && cargo build --release -p m1-infer --bin m1 >&2) || exit 1
  M1=${CARGO_TARGET_DIR:-$PWD/../../target}/release/m1
fi
python=$home/venv/bin/python
[ -x "$python" ] || python3 -m venv "$home/venv" || exit 1
wanted=$(cat requirements*.txt)
if [ "$(cat "$home/requirements" 2>/dev/null)" != "$wanted" ]; then
  files=(requirements*.txt)
  "$python" -m pip install -q --disable-pip-version-check "${files[@]/#/-r}" >&2 || exit 1
  printf '%s\n' "$wanted" >"$home/requirements"
fi

work=$(mktemp -d)
server=
finish() { [ -n "$server" ] && kill -9 "$server" 2>/dev/null; rm -rf "$work"; }
trap finish EXIT
failed=0
fail() { echo "FAIL  $*"; failed=1; }
wants() { [ -z "$only" ] || [ "$only" = "$1" ]; }

# Whether the model is loaded.
is_ready() {
  "$python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/health", timeout=5)' "$url" 2>/dev/null
}

# start FLAGS: a server on a free port; its process in $server, its address in $url.
start() {
  "$M1" serve --model "$model" --port 0 --device cpu "$@" >"$work/out" 2>"$work/log" &
  server=$!
  url=
  for _ in $(seq 600); do
    url=$(grep -ohE 'http://127\.0\.0\.1:[0-9]+' "$work/out" "$work/log" | head -1)
    [ -n "$url" ] && is_ready && return
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
  done
  cat "$work/log"
  fail "the server did not start"
  exit 1
}

# stop: SIGTERM to a server that has nothing to do.
stop() {
  kill -TERM "$server" 2>/dev/null
  status
}

# status: the server must have been told to end, and end well.
status() {
  local status=0
  wait "$server" || status=$?
  server=
  if [ $status = 0 ]; then echo "ok    the server ended with status 0"; else
    tail -20 "$work/log"
    fail "the server ended with status $status"
  fi
  if grep -qiE 'panicked|RUST_BACKTRACE' "$work/log"; then grep -iE -A3 panicked "$work/log"; fail "a panic in the log"; fi
}

if wants api; then
  echo "== the API, through OpenAI's package"
  start --api-key "secret-key"
  timeout "${minutes}m" "$python" api.py --url "$url" --key "secret-key" || fail "api.py"
  stop
fi
if wants page && [ -e page.py ]; then
  echo "== the page, in a browser"
  start --api-key "secret-key"
  timeout "${minutes}m" "$python" page.py --url "$url" --key "secret-key" || fail "page.py"
  stop
fi
if wants load; then
  echo "== under load"
  # Small limits: the cache must drop what it has, and what bodies took does not hide a leak.
  start --cache-memory 16MiB --max-body 1MiB --shutdown-timeout 3
  timeout "${minutes}m" "$python" load.py --url "$url" --pid "$server" --seconds "$seconds" --streams 64 --term || fail "load.py"
  status
fi
[ $failed = 0 ] && echo "all well" || echo "something failed"
exit $failed
