"""What benches/gpu.sh has found so far, in one file and one short table.

    python3 benches/report.py OUT PART... [--results FOLDER]

Reads OUT/PART.part (status, seconds), kernels.json, tiles.json, yardsticks.json, budget.json, agreement.json, latency-*,
throughput-* and torch-*.json and profile-*.csv, whichever are there and whole; writes OUT/gpu.json. With --results it is copied to
FOLDER/<date>-<device>.json if every part has passed. The exit code is 1 if a part has failed. Needs Python alone.
"""

import argparse
import csv
import datetime
import json
import math
import os
import pathlib
import re
import statistics

# Of what ncu measures, what explains a shortfall.
EXPLAINS = re.compile(
    r"^(gpu__time_duration\.sum|(sm|gpu__dram|dram|lts|l1tex)__(compute_memory_)?throughput\.avg\.pct.*"
    r"|sm__(inst_executed_)?pipe_tensor.*\.pct.*|sm__inst_issued.*\.pct.*|sm__warps_active\.avg\.pct.*|sm__maximum_warps.*\.pct.*"
    r"|smsp__average_warps_issue_stalled_\w+_per_issue_active\.ratio|launch__(registers_per_thread|occupancy_limit_\w+))$"
)


def read_json(path):
    """None if it is not there, or was cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_parts(out, names):
    parts = []
    for name in names:
        try:
            status, seconds = (out / f"{name}.part").read_text().split("\t")[:2]
        except (OSError, ValueError):
            status, seconds = "not run", 0
        parts.append({"name": name, "status": status, "seconds": int(seconds)})
    return parts


def read_device(out):
    """Name and driver as nvidia-smi says."""
    try:
        fields = [field.strip() for field in (out / "device.txt").read_text().splitlines()[0].split(",")]
        return {"name": fields[0], "driver": fields[1], "max_sm_clock": fields[2], "power_limit": fields[3]}
    except (OSError, IndexError):
        return None


def case(result):
    return (result["name"], result["model"], result["op"], json.dumps(result["shape"], sort_keys=True))


def add_yardsticks(kernels, yardsticks):
    """Puts the yardsticks of each kernel beside it: `ratio` above 1 means that the kernel is faster than the best of them."""
    found = {}
    for yardstick in yardsticks:
        found.setdefault(case(yardstick), []).append({k: yardstick[k] for k in ("yardstick", "what", "us")})
    for kernel in kernels:
        kernel["yardsticks"] = found.get(case(kernel), [])
        medians = [y["us"]["median"] for y in kernel["yardsticks"]]
        kernel["ratio"] = min(medians) / kernel["us"]["median"] if medians else None


def read_profile(path):
    """The metrics of EXPLAINS of the one launch in an ncu file (a line of names, one of units, one of values)."""
    rows = [row for row in csv.reader(path.read_text().splitlines()) if len(row) > 10]
    if len(rows) < 3:
        return None
    names, units, values = rows[:3]
    metrics = {n: f"{v} {u}".strip() for n, u, v in zip(names, units, values) if EXPLAINS.match(n)}
    return {"kernel": dict(zip(names, values)).get("Kernel Name"), "metrics": metrics}


def shape_text(shape):
    short = {"q_heads": "q", "kv_heads": "kv", "head_dim": "d", "sequences": "seqs"}
    return " ".join(f"{short.get(k, k)}={v}" for k, v in shape.items() if k != "causal")


def work(kernel):
    return (kernel["flops"], kernel["bytes"])


def table(kernels):
    """One line per kernel and use: the largest shape of the model that has most lines in common with the literature."""
    models = [k["model"] for k in kernels]
    model = next((m for m in ("llama-3.1-8b", "qwen2.5-7b") if m in models), models[0] if models else None)
    best = {}
    for kernel in kernels:
        key = (kernel["model"], kernel["op"], kernel["name"], kernel["model"] == "square" and kernel["flops"])
        if kernel["model"] in (model, "square") and work(kernel) >= work(best.get(key, kernel)):
            best[key] = kernel
    lines = [
        f"{model}, largest shapes",
        f"{'kernel':<20} {'for':<12} {'shape':<46} {'us':>10} {'':>14} {'% roofline':>10} {'yardstick us':>19} {'ratio':>6}",
    ]
    for kernel in best.values():
        compute = kernel["op"] in ("gemm", "attn_prefill")
        rate = f"{kernel['tflop_per_s']:.1f} TFLOP/s" if compute else f"{kernel['gb_per_s']:.0f} GB/s"
        percent, ratio = kernel["roofline_percent"], kernel["ratio"]
        percent = "-" if percent is None else f"{percent:.1f}"
        ratio = "-" if ratio is None else f"{ratio:.2f}"
        fastest = min(kernel["yardsticks"], key=lambda y: y["us"]["median"], default=None)
        yardstick = f"{fastest['us']['median']:.2f} {fastest['yardstick']:<6}" if fastest else "-"
        lines.append(
            f"{kernel['kernel']:<20} {kernel['name']:<12} {shape_text(kernel['shape']):<46} {kernel['us']['median']:>10.2f}"
            f" {rate:>14} {percent:>10} {yardstick:>19} {ratio:>6}"
        )
    return lines


def against_yardsticks(kernels):
    """Of every kind of kernel, at how many shapes it is at least as fast, and where it is worst."""
    lines = []
    for op in dict.fromkeys(k["op"] for k in kernels):
        beside = [k for k in kernels if k["op"] == op and k["ratio"]]
        if beside:
            worst = min(beside, key=lambda k: k["ratio"])
            wins = sum(k["ratio"] >= 1 for k in beside)
            lines.append(
                f"{op:<12} as fast as its yardstick at {wins} of {len(beside)} shapes, median ratio"
                f" {statistics.median(k['ratio'] for k in beside):.2f}, worst {worst['ratio']:.2f}"
                f" ({worst['model']} {worst['name']} {shape_text(worst['shape'])})"
            )
    return lines


def tile_lines(kernels, tiles):
    """How far the cost model's tile is from the best one."""
    best = {}
    for tile in tiles:
        best[case(tile)] = min(best.get(case(tile), math.inf), tile["us"]["median"])
    lost = {case(k): (k["us"]["median"] / best[case(k)] - 1, k) for k in kernels if case(k) in best}
    if not lost:
        return []
    worst, kernel = max(lost.values(), key=lambda pair: pair[0])
    near = sum(loss <= 0.03 for loss, _ in lost.values())
    return [
        f"the cost model's tile is within 3 % of the best at {near} of {len(lost)} shapes, at the worst {100 * worst:.0f} % slower"
        f" ({kernel['model']} {kernel['name']} {shape_text(kernel['shape'])})"
    ]


def model_lines(models):
    lines = []
    for name, report in models.items():
        results = report["results"]
        gap = results.get("time_per_output_token_ms")
        per_token = f"{gap['p50']:.3f}" if gap else "-"
        decode = results.get("decode_roofline_percent")
        lines.append(
            f"{name:<28} {results['time_to_first_token_ms']['p50']:>10.2f} ms to the first token"
            f" {per_token:>10} ms per token {results['output_tokens_per_second']:>10.1f} tokens/s"
            + (f" {decode:>6.1f} % of the roofline" if decode else "")
        )
    return lines


def budget_lines(measurements):
    lines = []
    for m in measurements:
        one, alone, cached = (m[run] for run in ("one_request", "calls_alone", "calls_with_prefix_cache"))
        lines.append(
            f"{m['n_ignore']} ends ignored, {m['tokens']} tokens: one request {one['seconds']:.3f} s; {m['calls']} calls"
            f" {alone['seconds'] / one['seconds']:.2f} times as long, {cached['seconds'] / one['seconds']:.2f} with a prefix cache"
        )
    return lines


def agreement_lines(results):
    return [
        f"{name}, {phase}: {100 * s['same_token']:.2f} % the same token of {s['places']}, regret {s['mean_regret']:.4f} mean,"
        f" {s['p99_regret']:.4f} p99, largest error {s['largest_error']:.3f}"
        for name, phases in results.items()
        for phase, s in phases.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--results", type=pathlib.Path, help="folder of results to keep")
    args = parser.parse_args()
    out = args.out

    kernels_report = read_json(out / "kernels.json") or {}
    kernels = kernels_report.get("results", [])
    add_yardsticks(kernels, (read_json(out / "yardsticks.json") or {}).get("results", []))
    tiles = (read_json(out / "tiles.json") or {}).get("results", [])
    reports = {p.stem: read_json(p) for kind in ("latency", "throughput", "torch") for p in sorted(out.glob(f"{kind}-*.json"))}
    models = {name: report for name, report in reports.items() if report}
    budget = (read_json(out / "budget.json") or {}).get("results", [])
    agreement = read_json(out / "agreement.json")
    profiles = {p.stem.removeprefix("profile-"): read_profile(p) for p in sorted(out.glob("profile-*.csv"))}
    device = read_device(out)
    parts = read_parts(out, args.parts)
    result = {
        "schema": "ponder-gpu",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("PONDER_COMMIT", "unknown"),
        "device": device["name"] if device else kernels_report.get("device", "unknown"),
        "driver": device["driver"] if device else None,
        "max_sm_clock": device["max_sm_clock"] if device else None,
        "power_limit": device["power_limit"] if device else None,
        "roofline": kernels_report.get("roofline"),
        "parts": parts,
        "kernels": kernels,
        "tiles": tiles,
        "models": models,
        "budget": budget,
        "agreement": agreement,
        "profiles": {name: profile for name, profile in profiles.items() if profile},
    }
    text = json.dumps(result, indent=1) + "\n"
    (out / "gpu.json").write_text(text)

    print(f"\n{result['device']}, driver {result['driver']}, commit {result['commit']}, {result['date']}\n")
    for part in parts:
        print(f"{part['name']:<28} {part['status']:<40} {part['seconds']:>5} s")
    # Times of the host target compare with nothing.
    summary = against_yardsticks(kernels) + tile_lines(kernels, tiles) if result["roofline"] else []
    for lines in (model_lines(models), budget_lines(budget), agreement_lines((agreement or {}).get("results", {})), summary, table(kernels) if kernels else []):
        if lines:
            print("", *lines, sep="\n")

    good = all(part["status"].startswith(("passed", "skipped")) for part in parts)
    if args.results and all(part["status"] == "passed" for part in parts):
        args.results.mkdir(parents=True, exist_ok=True)
        device_name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
        (args.results / f"{result['date'][:10]}-{device_name}.json").write_text(text)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
