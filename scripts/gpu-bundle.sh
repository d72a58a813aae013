#!/bin/sh
# gpu-bundle.sh [FEATURE FLAGS]: builds the binaries that benches/gpu.sh runs and puts them, stripped, into target/gpu-bundle/:
# `ponder`, `tests`, and the `commit` they were built from. And all that, packed, into target/gpu-bundle.tgz, a third of the size.
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
tests=$(cargo test --release --no-run --test tests "$@" 2>&1 | tee /dev/stderr | sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
strip -o "$bundle/tests" "$tests"
git rev-parse --short HEAD >"$bundle/commit" 2>/dev/null || true
tar -C target -czf "$bundle.tgz" gpu-bundle
du -h "$bundle"/* "$bundle.tgz"
