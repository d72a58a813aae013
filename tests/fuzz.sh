#!/usr/bin/env bash
# Runs every fuzz target for so many seconds (default 60), two at a time, from its stored corpus. A crash, a hang or too much
# memory fails; the input that did it is kept under fuzz/artifacts. Needs nothing but stable Rust: the coverage
# instrumentation is LLVM's, switched on by hand; the fuzzer comes with libfuzzer-sys.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
target=$(rustc -vV | sed -n 's/^host: //p')

export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
# With --target, build scripts and procedural macros go without the instrumentation.
cargo build --release --manifest-path fuzz/Cargo.toml --target "$target" --target-dir fuzz/target

run() {
    local name=$1 found=fuzz/target/corpus/$1
    mkdir -p "$found" "fuzz/artifacts/$name"
    if ! "fuzz/target/$target/release/$name" "$found" "fuzz/corpus/$name" -max_total_time="$seconds" -timeout=10 \
        -rss_limit_mb=1024 -malloc_limit_mb=256 -max_len=65536 -print_final_stats=1 \
        -artifact_prefix="fuzz/artifacts/$name/" >"fuzz/target/$name.log" 2>&1; then
        tail -n 40 "fuzz/target/$name.log"
        echo "fuzz target $name failed: see the input named above, and fuzz/target/$name.log"
        return 1
    fi
    echo "$name: $(sed -n 's/^stat::number_of_executed_units: *//p' "fuzz/target/$name.log") inputs in $seconds s, no crash"
}

failed=0
pids=()
for name in safetensors config thinking template request; do
    run "$name" &
    pids+=($!)
    if ((${#pids[@]} == 2)); then
        for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
        pids=()
    fi
done
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit $failed
