#!/usr/bin/env bash
# Compiles every CUDA kernel for sm_90a without a GPU and writes TABLE.md beside this script.
#   kernels/offline/run.sh           make the table anew
#   kernels/offline/run.sh --check   demand that the committed table is that of the sources; it is made anew and compared
#                                    if its hash is not theirs, or if the tools are here already; then this crate is linted
#                                    and tested too
# Tools: LLVM 22 from Debian's packages in place of the bundle that CubeCL's build script would download, and ptxas, NVRTC
# and nvdisasm from PyPI's wheels. They go to ${M1_OFFLINE:-~/.cache/m1-offline}.
set -euo pipefail
cd "$(dirname "$0")/../.."
tools=${M1_OFFLINE:-$HOME/.cache/m1-offline}
table=kernels/offline/TABLE.md

hash=$({
  find kernels/src \( -path '*cube*' -o -path '*gpu*' \) -name '*.rs'
  find kernels/offline/src -name '*.rs'
  echo kernels/offline/run.sh
  echo kernels/offline/Cargo.toml
  echo kernels/offline/Cargo.lock
} | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d' ' -f1)
if [ "${1:-}" = --check ] && grep -qs "Sources: \`$hash\`" "$table"; then
  echo "$table is that of the sources ($hash)"
  [ -e "$tools/ready" ] || exit 0
fi

# LLVM: headers and libraries where CubeCL's build script looks, with only the targets that CubeCL emits.
bundle=$tools/data/tracel/tracel-llvm-23.1.0-4
if [ ! -x /usr/lib/llvm-22/bin/llvm-config ]; then
  sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
  $sudo apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends \
    llvm-22-dev libzstd-dev libxml2-dev zlib1g-dev libffi-dev libtinfo-dev libz3-dev >/dev/null
fi
if [ ! -e "$bundle/.tracel-llvm-installed" ]; then
  config=/usr/include/llvm-22/llvm/Config
  mkdir -p "$bundle/bin" "$bundle/include/llvm/Config"
  ln -sfn /usr/lib/llvm-22/lib "$bundle/lib"
  ln -sfn /usr/include/llvm-c-22/llvm-c "$bundle/include/llvm-c"
  find /usr/include/llvm-22/llvm -mindepth 1 -maxdepth 1 ! -name Config -exec ln -sfn {} "$bundle/include/llvm/" \;
  for header in "$config"/*; do
    case $header in
      */AsmParsers.def | */AsmPrinters.def | */Disassemblers.def | */Targets.def)
        sed -E '/^LLVM_[A-Z_]+\((X86|NVPTX)\)$/b;/^LLVM_[A-Z_]+\([A-Za-z0-9]+\)$/d' "$header" \
          >"$bundle/include/llvm/Config/$(basename "$header")" ;;
      *) ln -sfn "$header" "$bundle/include/llvm/Config/" ;;
    esac
  done
  cat >"$bundle/bin/llvm-config" <<SHIM
#!/bin/bash
real=/usr/lib/llvm-22/bin/llvm-config
case "\$*" in
  *--system-libs*) echo "-lrt -ldl -lm -lz -lzstd -lxml2 -lz3 -lffi -ltinfo" ;;
  *--libs*) \$real --link-static --libs core analysis passes orcjit mcjit executionengine interpreter native nvptx x86 \
    bitreader bitwriter irreader linker ipo target asmparser support object debuginfodwarf jitlink runtimedyld \
    all-targets 2>/dev/null | tr ' ' '\n' | grep -vi polly | tr '\n' ' ' ;;
  *--includedir*) echo "$bundle/include" ;;
  *--cxxflags*) echo "-I$bundle/include -std=c++17 -fno-exceptions -funwind-tables -D_GNU_SOURCE -D__STDC_CONSTANT_MACROS -D__STDC_FORMAT_MACROS -D__STDC_LIMIT_MACROS" ;;
  *) exec \$real "\$@" ;;
esac
SHIM
  chmod +x "$bundle/bin/llvm-config"
  touch "$bundle/.tracel-llvm-installed"
fi

if [ ! -x "$tools/venv/bin/pip" ]; then
  python3 -m venv "$tools/venv"
fi
"$tools/venv/bin/pip" install -q --disable-pip-version-check nvidia-cuda-nvcc-cu12==12.9.86 nvidia-cuda-nvrtc-cu12==12.9.86 \
  nvidia-cuda-runtime-cu12==12.9.79 nvidia-cuda-cccl-cu12==12.9.27 nvidia-cuda-nvdisasm==13.5.37
site=$(echo "$tools"/venv/lib/python3*/site-packages)

export XDG_DATA_HOME=$tools/data CARGO_TARGET_DIR=$tools/target
manifest=kernels/offline/Cargo.toml
cargo build --locked --manifest-path $manifest
touch "$tools/ready"
if [ "${1:-}" = --check ]; then
  cargo clippy --locked --manifest-path $manifest --all-targets -- -D warnings
  cargo test --locked --manifest-path $manifest
fi
made=$tools/TABLE.md
# CUDA_PATH: LLVM's kernels take exp from the toolkit's libdevice.
CUDA_PATH=$site/nvidia/cuda_nvcc "$tools/target/debug/m1-offline" table --tools "$site" --work "$tools/work" --out "$made" --sources "$hash"
if [ "${1:-}" = --check ]; then
  diff -u "$table" "$made" || { echo "$table is out of date: run kernels/offline/run.sh and commit it" >&2; exit 1; }
else
  cp "$made" "$table.tmp" && mv "$table.tmp" "$table"
fi
