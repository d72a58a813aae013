#!/bin/sh
# gpu-bundle.sh [FEATURE FLAGS]: builds the binaries that benches/gpu.sh runs and puts them, stripped, into target/gpu-bundle/:
# `ponder`, `tests`, each bench by its name, and the `commit` they were built from.
set -eu
# That machine reaches no hub.
[ $# -gt 0 ] || set -- --no-default-features --features cuda
cd "$(dirname "$0")/.."
bundle=target/gpu-bundle
rm -rf "$bundle"
mkdir -p "$bundle"

# cargo names what it built: "Executable tests/tests.rs (target/release/deps/tests-0123)".
cargo build --release "$@"
strip -o "$bundle/ponder" target/release/ponder
cargo test --release --no-run --test tests --benches "$@" 2>&1 | tee /dev/stderr |
    sed -n 's/^ *Executable [^(]*\(tests\|benches\)\/\([a-z_]*\)\.rs (\(.*\))$/\2 \3/p' |
    while read -r name path; do strip -o "$bundle/$name" "$path"; done
[ -x "$bundle/tests" ]
git rev-parse --short HEAD >"$bundle/commit" 2>/dev/null || true
du -ch "$bundle"/*
