#!/usr/bin/env bash
# How many tokens a second `ponder serve` can stream, and whether its memory stays: 256 clients, of 7B on a simulated H100,
# which takes the time that its roofline says and makes up the tokens. Needs no GPU. Writes RESULT: what the clients saw
# (`ponder bench serve --json`), and the server's processor seconds and memory by the minute.
#
#   benches/sse.sh [RESULT.json] [REQUESTS]     23000 requests of 1000 tokens take about ten minutes
set -euo pipefail
cd "$(dirname "$0")/.."
result=${1:-target/sse.json}
requests=${2:-23000}
ponder=${PONDER:-target/release/ponder}
work=$(mktemp -d)
trap 'kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT

# The large model's shape with the tiny one's words.
cp models/modulo/{tokenizer.json,tokenizer_config.json,thinking.json} "$work"
python3 - benches/models/qwen2.5-7b/config.json models/modulo/config.json "$work/config.json" <<'PYTHON'
import json, sys
large, words, out = sys.argv[1:]
config = json.load(open(large)) | {k: v for k, v in json.load(open(words)).items() if k in ("eos_token_id", "bos_token_id")}
json.dump(config, open(out, "w"))
PYTHON

RUST_LOG=warn "$ponder" serve "$work" --load-format dummy --device sim:h100 --port 0 --max-sequences 256 --max-context 2048 \
    2> "$work/log" &
server=$!
port=
for _ in $(seq 100); do
    port=$(ss -tlnp 2>/dev/null | sed -n "s/.*127.0.0.1:\([0-9]*\).*pid=$server,.*/\1/p")
    [ -n "$port" ] && break
    kill -0 "$server" || { cat "$work/log"; exit 1; }
    sleep 0.2
done
kibibytes() { awk -v name="$1:" '$1 == name { print $2 }' "/proc/$server/status"; }
(while memory=$(kibibytes VmRSS) && [ -n "$memory" ]; do echo "$memory"; sleep 60; done) > "$work/memory" 2>/dev/null &
"$ponder" bench serve "http://127.0.0.1:$port" --requests "$requests" --max-concurrency 256 --input-tokens 32 \
    --output-tokens 1000 --warmup 1 --json "$work/clients.json"
kibibytes VmRSS >> "$work/memory"
seconds=$(awk '{ print ($14 + $15) / 100 }' "/proc/$server/stat")
python3 - "$work/clients.json" "$result" "$seconds" "$work/memory" <<'PYTHON'
import json, sys
clients, out, seconds, memory = sys.argv[1:]
# What is of each request, or of each of its tokens, is in the percentiles.
result = {key: value for key, value in json.load(open(clients)).items() if not isinstance(value, list)}
result["server_processor_seconds"] = float(seconds)
result["server_resident_mebibytes"] = [round(int(line) / 1024, 1) for line in open(memory)]
json.dump(result, open(out, "w"), indent=1)
print("server: %.1f processor seconds, resident MiB by the minute %s" % (float(seconds), result["server_resident_mebibytes"]))
PYTHON
