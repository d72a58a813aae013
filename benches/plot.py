"""docs/roofline and docs/yardsticks, SVG and PNG, from the results of benches/gpu.sh or, without any, from the predictions.

    make plots                                                     # benches/results/ if there are any, else predictions.json
    .toolchain/matplotlib/bin/python benches/plot.py RESULTS.json

Needs matplotlib (scripts/toolchain.sh matplotlib).
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Colours that differ for everybody (Okabe and Ito), and a mark for each.
OPERATIONS = {
    "gemm": ("products of prompts", "#0072B2", "o"),
    "attn_prefill": ("attention of prompts", "#D55E00", "s"),
    "gemv": ("products of decode", "#009E73", "^"),
    "attn_decode": ("attention of decode", "#CC79A7", "D"),
}
OURS, THEIRS = "#0072B2", "#BBBBBB"
plt.rcParams.update(
    {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "svg.hashsalt": "ponder",
    }
)


def newest():
    results = sorted(pathlib.Path("benches/results").glob("*.json"))
    return results[-1] if results else pathlib.Path("benches/predictions.json")


def save(figure, name):
    for kind in ("svg", "png"):
        # No date, so that the same results are the same file.
        figure.savefig(f"docs/{name}.{kind}", dpi=160, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else {})
    plt.close(figure)


def roofline(kernels, limits, source):
    bytes_, flops = limits["bytes_per_second"], limits["flops_per_second"]
    figure, axes = plt.subplots(figsize=(9.5, 5.6))
    least, most = 0.6, 9000
    ridge = flops / bytes_
    axes.plot([least, ridge, most], [least * bytes_ / 1e12, flops / 1e12, flops / 1e12], color="#333333", linewidth=1.6)
    axes.text(1.5, 1.5 * bytes_ / 1e12 * 1.25, f"HBM, {bytes_ / 1e12:.2f} TB/s", rotation=34.5, rotation_mode="anchor", color="#333333")
    axes.text(most, flops / 1e12 * 1.12, f"tensor cores, bf16, {flops / 1e12:.0f} TFLOP/s", ha="right", color="#333333")
    for op, (label, colour, mark) in OPERATIONS.items():
        chosen = [k for k in kernels if k["op"] == op]
        x = [k["flops"] / k["bytes"] for k in chosen]
        y = [k["tflop_per_s"] for k in chosen]
        axes.scatter(x, y, s=34, marker=mark, color=colour, alpha=0.65, linewidths=0, label=f"{label} ({len(chosen)})", zorder=3)
    axes.set(xscale="log", yscale="log", xlim=(least, most), ylim=(0.3, 2200))
    axes.set_xlabel("arithmetic intensity (FLOP per byte that must move)")
    axes.set_ylabel("TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,g}")
    axes.grid(True, which="major", color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.set_title(f"Kernels at the shapes of four models, one H100\n{source}", loc="left", fontsize=12)
    axes.legend(loc="lower right", frameon=True, edgecolor="#DDDDDD")
    save(figure, "roofline")


def shape_text(kernel):
    s = kernel["shape"]
    if kernel["op"] in ("gemm", "gemv"):
        return f"{s['rows']} × {s['n']} × {s['k']}"
    keys = s["keys"] // s["sequences"]
    return f"{s['sequences']} × {keys:,} keys" if kernel["op"] == "attn_decode" else f"{s['rows']:,} tokens"


def compared(kernels):
    """Of each kind of kernel a few large shapes that have a yardstick."""
    for op in OPERATIONS:
        beside = [k for k in kernels if k["op"] == op and k.get("yardsticks") and k["model"] in ("llama-3.1-8b", "square")]
        # A use once per model, at its largest shape; all single sequences of attention.
        last = {(k["model"], k["name"], k["shape"]["rows"] if "attn" in op or k["model"] == "square" else 0): k for k in beside}
        yield from list(last.values())[-7:]


def yardsticks(kernels, source):
    chosen = list(compared(kernels))[::-1]
    figure, axes = plt.subplots(figsize=(9.5, 1.6 + 0.52 * len(chosen)))
    for y, kernel in enumerate(chosen):
        fastest = min(kernel["yardsticks"], key=lambda yardstick: yardstick["us"]["median"])
        ours, theirs = kernel["us"]["median"], fastest["us"]["median"]
        compute = kernel["op"] in ("gemm", "attn_prefill")
        unit = "TFLOP/s" if compute else "GB/s"
        work = kernel["flops"] / 1e6 if compute else kernel["bytes"] / 1e3
        # Bars are in % of the roofline, so that all kinds of kernels fit on one axis.
        percent = kernel["roofline_percent"]
        of_theirs = percent * ours / theirs
        axes.barh(y + 0.2, percent, 0.38, color=OURS, label="ponder" if y == 0 else None)
        axes.barh(y - 0.2, of_theirs, 0.38, color=THEIRS, label="yardstick" if y == 0 else None)
        axes.text(percent + 0.8, y + 0.2, f"{work / ours:,.0f} {unit}", va="center", fontsize=9)
        axes.text(of_theirs + 0.8, y - 0.2, f"{work / theirs:,.0f}  {fastest['yardstick']}", va="center", fontsize=9, color="#555555")
    axes.set_yticks(range(len(chosen)), [f"{OPERATIONS[k['op']][0]}\n{k['name']}, {shape_text(k)}" for k in chosen], fontsize=9)
    axes.set_xlim(0, 118)
    axes.set_xlabel("% of the roofline")
    axes.axvline(100, color="#333333", linewidth=1, zorder=0)
    axes.grid(True, axis="x", color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.set_title(f"Against the yardsticks, Llama 3.1 8B and square products, one H100\n{source}", loc="left", fontsize=12)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    save(figure, "yardsticks")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, nargs="?", default=newest())
    report = json.loads(parser.parse_args().results.read_text())
    if not report.get("roofline"):
        parser.error("these results are not of a GPU")
    if report["schema"] == "ponder-predictions":
        source, yardstick_source = "PREDICTION, NOT MEASURED", "PREDICTION, NOT MEASURED; yardsticks as published (attention: batches of 16k tokens)"
    else:
        source = yardstick_source = f"measured: {report['device']}, {report['date'][:10]}, commit {report['commit']}"
    pathlib.Path("docs").mkdir(exist_ok=True)
    roofline(report["kernels"], report["roofline"], source)
    yardsticks(report["kernels"], yardstick_source)


if __name__ == "__main__":
    main()
