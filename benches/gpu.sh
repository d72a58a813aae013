#!/usr/bin/env bash
# Everything that only a GPU can tell, in one run: the tests on the device, compute-sanitizer on small shapes, the benches and
# a profile of the kernels. Needs no Rust: `make gpu-bundle` elsewhere, copy the repository with target/gpu-bundle/, then
#     OUT=results benches/gpu.sh [PART...]
# Parts: tests memcheck racecheck synccheck bench profile. Each has its own time limit and none stops the next; the summary
# comes last and in $OUT/summary.txt. `TEST_DEVICE=host benches/gpu.sh` rehearses it without a GPU and its tools.
set -u
cd "$(dirname "$0")/.."
export TEST_DEVICE=${TEST_DEVICE:-cuda}
export OUT=${OUT:-target/gpu-results}
out=$OUT
# With a GPU ten minutes in all; the host target takes longer.
device=cuda:0 patience=1
[ "$TEST_DEVICE" != host ] || device=host patience=5
bundle=$PWD/target/gpu-bundle
mkdir -p "$out"
[ -x "$bundle/tests" ] || {
    echo "no $bundle/tests: run \`make gpu-bundle\` where there is a Rust toolchain" >&2
    exit 2
}

# Tests that launch every kernel on shapes small enough for a sanitizer that makes them 100 times slower.
small=(attention::decode_of_padding_only attention::decode_at_the_edges attention::rope norms products::gemv_clips
    products::gemm_adds sampler::greedy model::a_checked_run)

summary=$out/summary.txt
failed=0
{
    echo "$(date -u +%FT%TZ) device $TEST_DEVICE, commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    [ "$TEST_DEVICE" = host ] || nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader
} | tee "$summary"

# part NAME SECONDS COMMAND...: runs it with its output in $OUT/NAME.log and a line in the summary.
part() {
    local name=$1 limit=$(($2 * patience)) result
    shift 2
    [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]} " = *" $name "* ]] || return 0
    local start=$SECONDS
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    case $? in
    0)
        result=passed
        # A test binary that ran no test has shown nothing.
        ! grep -q '^test result: ok. 0 passed' "$out/$name.log" || result="FAILED (no tests)" failed=1
        ;;
    124 | 137) result="stopped after $limit s" failed=1 ;;
    *) result=FAILED failed=1 ;;
    esac
    tail -n 3 "$out/$name.log" | cut -c1-160
    printf '%-10s %-22s %4d s\n' "$name" "$result" $((SECONDS - start)) | tee -a "$summary"
}

# On the host target there is nothing to sanitize with (its own checks are always on), so the same tests run plainly.
sanitize() {
    local tool=$1
    shift
    if [ "$TEST_DEVICE" = host ]; then "$@"; else
        compute-sanitizer --tool "$tool" --error-exitcode 9 --launch-timeout 60 --print-limit 20 "$@"
    fi
}

profile() {
    if [ "$TEST_DEVICE" = host ]; then "$@"; else
        ncu --csv --clock-control none --set speed-of-light "$@"
    fi
}
export -f sanitize profile

wanted=("$@")
# Not the tests of what was compiled, which need the compilers, nor those of the SIMT machine.
part tests 240 "$bundle/tests" --test-threads 1 --skip cuda:: --skip resources:: --skip simt::
for tool in memcheck racecheck synccheck; do
    part $tool 70 bash -c 'sanitize "$@"' _ $tool "$bundle/tests" --test-threads 1 "${small[@]}"
done
part bench 60 bash -c 'for run in 1 2 3; do "$@" --json >"$OUT/bench$run.json" || exit 1; done; "$@" --profile' _ \
    "$bundle/ponder" generate models/modulo "Find x with 7x + 4 = 1 (mod 11)." --n-ignore 1 --device "$device"
part profile 60 bash -c 'profile "$@"' _ "$bundle/tests" --test-threads 1 "${small[@]}"

echo
cat "$summary"
exit $failed
