#!/usr/bin/env bash
# Everything that only a GPU can tell, in one run of ten minutes: the tests on the device, compute-sanitizer on small shapes, every
# kernel and whole models beside torch, logits of a 7B beside transformers', and a profile of the main kernels. Needs no Rust: `make gpu-bundle` elsewhere, copy the
# repository with target/gpu-bundle.tgz, then
#     OUT=results benches/gpu.sh [PART...]
# It always ends with $OUT/gpu.json and a short table (benches/report.py): a part that fails or hangs stops no other. A part that
# has passed is not run again unless the binaries change or FORCE=1, so a run that was cut short is simply started again.
#   SECONDS_TOTAL  600 (3000 on the host target)   each part may use its share of it, and what earlier ones left
#   PYTHON         python3                         the one that has torch and transformers
#   RESULTS=1      copies gpu.json to benches/results/ if every part has passed
# `TEST_DEVICE=host benches/gpu.sh` rehearses it without a GPU, on the smallest shapes.
set -u
cd "$(dirname "$0")/.."
export TEST_DEVICE=${TEST_DEVICE:-cuda} OUT=${OUT:-target/gpu-results} PYTHON=${PYTHON:-python3}
export bundle=${BUNDLE:-$PWD/target/gpu-bundle}
export PATH=$PATH:/usr/local/cuda/bin
mkdir -p "$OUT"
[ ! "$bundle.tgz" -nt "$bundle/tests" ] || tar -C "$(dirname "$bundle")" -xzf "$bundle.tgz"
[ -x "$bundle/tests" ] || {
    echo "no $bundle/tests: run \`make gpu-bundle\` where there is a Rust toolchain" >&2
    exit 2
}
PONDER_COMMIT=$(git rev-parse --short HEAD 2>/dev/null || cat "$bundle/commit" 2>/dev/null || echo unknown)
export PONDER_COMMIT
# What the results of a part belong to.
key="$TEST_DEVICE $(cat "$bundle/tests" "$bundle/ponder" | cksum)"

if [ "$TEST_DEVICE" = host ]; then
    export device=host OMP_NUM_THREADS=1
    total=${SECONDS_TOTAL:-3000}
    models=(models/modulo)
else
    export device=cuda:0
    total=${SECONDS_TOTAL:-600}
    models=(benches/models/qwen2.5-7b benches/models/qwen2.5-32b)
fi

# ---- the parts: functions; 77 means skipped, for the reason in the last line ----

skip() {
    echo "skipped: $1"
    exit 77
}

# Not the tests of what was compiled, which need the compilers, nor those of the SIMT machine and of scripts.
run_tests() { "$bundle/tests" --test-threads 1 --skip cuda:: --skip resources:: --skip simt:: --skip scripts::; }

# Tests that launch every kernel on shapes small enough for a sanitizer that makes them 100 times slower. On the host target
# there is nothing to sanitize with (its own checks are always on), so they run plainly.
sanitize() {
    local small=(attention::decode_of_padding_only attention::decode_at_the_edges attention::rope norms products::gemv_clips
        products::gemm_adds fp8_products::weights fp8_products::gemv_rotates sampler::greedy model::a_checked_run)
    local tool=(compute-sanitizer --tool "$1" --error-exitcode 9 --launch-timeout 60 --print-limit 20)
    [ "$TEST_DEVICE" != host ] || tool=()
    [ "$TEST_DEVICE" = host ] || command -v compute-sanitizer >/dev/null || skip "no compute-sanitizer"
    "${tool[@]}" "$bundle/tests" --test-threads 1 "${small[@]}"
}

run_kernels() {
    local seconds=0.1
    [ "$TEST_DEVICE" != host ] || seconds=0
    "$bundle/ponder" bench kernels --device "$device" --seconds $seconds --json "$OUT/kernels.json"
}

# Every tile of every prefill product, to hold the cost model (engine/tiling.rs) against.
run_tiles() {
    local seconds=0.01
    [ "$TEST_DEVICE" != host ] || seconds=0
    "$bundle/ponder" bench kernels --device "$device" --filter "gemm " --all-tiles --seconds $seconds --json "$OUT/tiles.json"
}

run_yardsticks() {
    [ -s "$OUT/kernels.json" ] || skip "no kernels.json to stand beside"
    "$PYTHON" benches/yardsticks.py "$OUT/kernels.json" --device "$TEST_DEVICE" --json "$OUT/yardsticks.json"
}

lengths() {
    if [ "$TEST_DEVICE" = host ]; then
        echo --input-tokens 64 --output-tokens 16
    else
        echo --input-tokens 1024 --output-tokens 128
    fi
}

model() {
    local name
    name=$(basename "$1")
    local flags=("$1" --load-format dummy --device "$device" $(lengths))
    for batch in 1 16; do
        "$bundle/ponder" bench latency "${flags[@]}" --iterations 3 --batch $batch --json "$OUT/latency-$name-$batch.json" || return
        "$bundle/ponder" bench latency "${flags[@]}" --quantize fp8 --iterations 3 --batch $batch --json "$OUT/latency-$name-fp8-$batch.json" || return
    done
    local requests=64
    [ "$TEST_DEVICE" != host ] || requests=20
    "$bundle/ponder" bench throughput "${flags[@]}" --requests $requests --iterations 1 --warmup 0 --json "$OUT/throughput-$name.json"
}

torch_model() {
    for batch in 1 16; do
        "$PYTHON" benches/transformers_decode.py "$1" --load-format dummy --device "$TEST_DEVICE" $(lengths) --iterations 3 \
            --batch $batch --json "$OUT/torch-$(basename "$1")-$batch.json" || return
    done
}

# One request against s1's loop of calls, with the tiny model: dummy weights never end their thinking.
run_budget() {
    local ignored=0,1,2,4,6
    [ "$TEST_DEVICE" != host ] || ignored=0,1
    "$bundle/ponder" bench budget models/modulo --device "$device" --n-ignore $ignored --json "$OUT/budget.json"
}

# The same tokens through transformers, with random weights of a real size; they go once they have served.
run_agreement() {
    local weights=target/agreement model=benches/models/qwen2.5-7b lengths=()
    [ "$TEST_DEVICE" != host ] || model=models/modulo lengths=(--input-tokens 96 --output-tokens 12)
    "$PYTHON" models/golden/agreement.py "$model" --weights $weights --ponder "$bundle/ponder" --device "$TEST_DEVICE" \
        "${lengths[@]}" --json "$OUT/agreement.json" && rm -rf $weights
}

# One launch of each main kernel on a big shape: how busy each unit is, and what the warps wait for.
run_profile() {
    [ "$TEST_DEVICE" = host ] || command -v ncu >/dev/null || skip "no ncu"
    local shapes=llama-3.1-8b cases=(
        "gemm         gate_up     rows=2048 "
        "attn_prefill prefill     q=32 kv=8 d=128 rows=16384 "
        "attn_decode  decode      q=32 kv=8 d=128 rows=16 keys=131072 "
        "gemv         gate_up     rows=1 "
        "gemm_fp8     gate_up     rows=2048 "
        "gemv_fp8     gate_up     rows=1 "
        "sample       top_k_top_p rows=16 "
    )
    [ "$TEST_DEVICE" != host ] || shapes=tiny cases=(
        "gemm         gate_up     rows=300 "
        "attn_prefill prefill     q=4 kv=2 d=64 rows=100 "
        "attn_decode  decode      q=4 kv=2 d=64 rows=1 "
        "gemv         gate_up     rows=1 "
        "gemm_fp8     gate_up     rows=300 "
        "gemv_fp8     gate_up     rows=1 "
        "sample       top_k_top_p rows=1 "
    )
    local result=0 case kernel
    for case in "${cases[@]}"; do
        kernel=${case%% *}
        local ncu=(ncu --csv --page raw --log-file "$OUT/profile-$kernel.csv" --clock-control none
            --section SpeedOfLight --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis
            --section WarpStateStats --section Occupancy --section LaunchStats
            --kernel-name "regex:^$(case $kernel in gemm) echo gemm_silu ;; gemm_fp8) echo gemm_fp8_silu ;; *) echo $kernel ;; esac)" --launch-skip 2 --launch-count 1)
        [ "$TEST_DEVICE" != host ] || ncu=()
        timeout --kill-after=5 60 "${ncu[@]}" "$bundle/ponder" bench kernels --device "$device" --shapes $shapes \
            --filter "$case" --seconds 0 || result=1
    done
    return $result
}
export -f skip run_tests sanitize run_kernels run_tiles run_yardsticks lengths model torch_model run_budget run_agreement run_profile

# ---- running them, the most valuable first ----

parts=() shares=() commands=()
part() { # NAME SHARE COMMAND
    parts+=("$1") shares+=("$2") commands+=("$3")
}
part tests 100 run_tests
part memcheck 50 "sanitize memcheck"
part racecheck 40 "sanitize racecheck"
part synccheck 25 "sanitize synccheck"
part kernels 85 run_kernels
part yardsticks 60 run_yardsticks
for folder in "${models[@]}"; do part "$(basename "$folder")" $((90 / ${#models[@]})) "model $folder"; done
for folder in "${models[@]}"; do part "torch-$(basename "$folder")" $((80 / ${#models[@]})) "torch_model $folder"; done
part budget 15 run_budget
part agreement 90 run_agreement
part profile 50 run_profile
part tiles 20 run_tiles

pending=()
for i in "${!parts[@]}"; do
    [ $# -eq 0 ] || [[ " $* " = *" ${parts[i]} "* ]] || continue
    state=$(cat "$OUT/${parts[i]}.part" 2>/dev/null)
    [ -z "${FORCE:-}" ] && [[ $state = passed*"$key" ]] || pending+=("$i")
done

if [ "$TEST_DEVICE" != host ]; then
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader >"$OUT/device.txt" 2>&1
fi

child=
report() {
    trap - EXIT
    [ -z "$child" ] || kill -KILL -- -"$child" 2>/dev/null
    "$PYTHON" benches/report.py "$OUT" "${parts[@]}" ${RESULTS:+--results benches/results}
    exit $?
}
trap report EXIT
trap 'exit 143' INT TERM

share() { # of the parts from the Nth pending on
    local sum=0 i
    for i in "${pending[@]:$1}"; do sum=$((sum + shares[i])); done
    echo $sum
}
whole=$(share 0)
for n in "${!pending[@]}"; do
    i=${pending[n]} name=${parts[${pending[n]}]} start=$SECONDS
    # All that is left, but for the shares of those that come later, and for the report.
    limit=$((total - 5 - SECONDS - $(share $((n + 1))) * total / whole))
    [ $limit -ge 1 ] || limit=1
    printf 'stopped\t0\t%s\n' "$key" >"$OUT/$name.part"
    # At once and the whole group: what is deaf to SIGTERM would go on holding the GPU.
    timeout --signal=KILL $limit bash -c "${commands[i]}" >"$OUT/$name.log" 2>&1 </dev/null &
    child=$!
    wait $child
    code=$?
    child=
    case $code in
    # A test binary that ran no test has shown nothing.
    0) grep -q '^test result: ok. 0 passed' "$OUT/$name.log" && result="failed (no tests)" || result=passed ;;
    77) result=$(tail -n 1 "$OUT/$name.log") ;;
    124 | 137) result="stopped after $limit s" ;;
    *) result="failed (exit code $code)" ;;
    esac
    printf '%s\t%s\t%s\n' "$result" $((SECONDS - start)) "$key" >"$OUT/$name.part"
    printf '%-20s %-30s %4d s\n' "$name" "$result" $((SECONDS - start))
    case $result in failed* | stopped*) tail -n 3 "$OUT/$name.log" | cut -c1-160 | sed 's/^/    /' ;; esac
done
