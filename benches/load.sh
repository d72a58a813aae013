#!/usr/bin/env bash
# How long a checkpoint of a real size takes to load, beside reading its files once, in turns, each time from the disk. Makes the
# checkpoint, of random weights (models/golden/real_size.py), and removes it. Needs root, to empty the system's page cache, disk
# for the weights, and on the host target memory for them. Writes RESULT: `ponder bench load --json`, and seconds of every run.
#
#   benches/load.sh [RESULT.json] [MODEL] [DEVICE]
#   RUNS=3  WEIGHTS=target/load  DTYPE=BF16, F16 or F32  PYTHON=python3, which has numpy
set -euo pipefail
cd "$(dirname "$0")/.."
result=${1:-target/load.json} model=${2:-benches/models/qwen2.5-7b} device=${3:-host}
weights=${WEIGHTS:-target/load}
ponder=${PONDER:-target/release/ponder}
export PONDER_COMMIT=${PONDER_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
work=$(mktemp -d)
trap 'rm -rf "$work" "$weights"' EXIT

[ -e "$weights/model.safetensors.index.json" ] || "${PYTHON:-python3}" models/golden/real_size.py "$model" "$weights" \
    --dtype "${DTYPE:-BF16}"
from_disk() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}
for run in $(seq "${RUNS:-3}"); do
    from_disk
    python3 - "$weights" >"$work/read-$run" <<'PYTHON'
import pathlib, subprocess, sys, time
files = sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors"))
start = time.monotonic()
subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
print(time.monotonic() - start)
PYTHON
    from_disk
    "$ponder" bench load "$weights" --device "$device" --json "$work/load-$run.json"
done
python3 - "$work" "$result" "$model" "${DTYPE:-BF16}" <<'PYTHON'
import json, pathlib, statistics, sys
work, out, model = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
loads = [json.load(open(path)) for path in sorted(work.glob("load-*.json"))]
reads = [float(path.read_text()) for path in sorted(work.glob("read-*"))]
result = sorted(loads, key=lambda load: load["results"]["seconds"])[len(loads) // 2]
result["args"] |= {"model": model, "dtype": sys.argv[4]}
result["read_seconds"] = reads
result["load_seconds"] = [load["results"]["seconds"] for load in loads]
result["ratio"] = statistics.median(result["load_seconds"]) / statistics.median(reads)
json.dump(result, open(out, "w"), indent=1)
peak = max(load["results"]["peak_resident_bytes"] or 0 for load in loads) / result["results"]["bytes"]
print("read in %.1f s, loaded in %.1f s (medians of %d): %.2f times as long; memory %.3f times the weights"
      % (statistics.median(reads), statistics.median(result["load_seconds"]), len(reads), result["ratio"], peak))
PYTHON
