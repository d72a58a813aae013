"""The pictures and the tables of numbers of docs/kernels: how each kernel cuts its work and what its warps do, and where it should
stand on the roofline (predictions.json: not measured).

    make plots                                             # calls this, too
    .toolchain/matplotlib/bin/python benches/draw_kernels.py

Writes docs/kernels/KERNEL.svg, and in KERNEL.md what stands between the two comments "numbers". Needs matplotlib.
"""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = pathlib.Path("docs/kernels")
# Okabe and Ito, lightened: text is written on them.
COLOURS = ["#8ecae6", "#f4b183", "#a8d5ba", "#e5b8d4", "#fbe28f", "#b8b8e8", "#d9c6a5", "#c3e0e5"]
LOAD, TENSOR, MATH, WAIT, STORE = "#8ecae6", "#f4b183", "#a8d5ba", "#eeeeee", "#e5b8d4"
plt.rcParams.update({"font.size": 9.5, "figure.facecolor": "white", "savefig.facecolor": "white", "svg.hashsalt": "ponder"})


def box(axes, x, y, width, height, text="", colour="#ffffff", size=9, edge="#444444"):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=edge, linewidth=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def note(axes, x, y, text, **more):
    axes.text(x, y, text, **({"ha": "left", "va": "center", "fontsize": 9} | more))


def arrow(axes, start, end):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color="#444444", linewidth=1))


def roles(axes, top, rows, left=17, width=83):
    """Who does what, time to the right. rows: (who, [(length, text, colour)])."""
    height = 6.2
    for i, (who, parts) in enumerate(rows):
        y = top - (i + 1) * (height + 1.4)
        note(axes, 0, y + height / 2, who)
        total, x = sum(length for length, _, _ in parts), left
        for length, text, colour in parts:
            part = width * length / total
            box(axes, x, y, part, height, text, colour, size=8.2)
            x += part
    note(axes, left + width, top - len(rows) * (height + 1.4) - 2.6, "time →", ha="right", color="#777777")


def title(axes, y, text):
    note(axes, 0, y, text, fontsize=10.5, fontweight="bold")


def gemm(axes):
    title(axes, 97, "The work: tiles of 128 rows × N columns of c, walked by at most one block per SM")
    for row in range(4):
        for column in range(8):
            # Groups of near-square shape run together.
            group, inside = column // 4, row * 4 + column % 4
            number = group * 16 + inside
            box(axes, 17 + column * 8, 88 - (row + 1) * 8, 8, 8, str(number), COLOURS[number // 12 % 4], size=8)
    note(axes, 0, 72, "128 rows of a\nfor each tile")
    note(axes, 49, 91.3, "96 to 256 rows of w for each tile", ha="center")
    note(axes, 84, 80, "colour: wave\n(here of 12)", fontsize=8.5)
    note(axes, 84, 64, "cluster of 2:\ntwo tiles above\neach other share\ntheir strip of w", fontsize=8.5)
    title(axes, 46, "A block: 3 warpgroups")
    stage = [(1, f"load k{i}", LOAD) for i in range(8)]
    roles(axes, 44, [
        ("producer\n(1 thread)", stage + [(1, "next tile", LOAD)]),
        ("consumer 1\nrows 0–63", [(1, "", WAIT)] + [(1, f"wgmma k{i}", TENSOR) for i in range(7)] + [(1, "…", TENSOR)]),
        ("consumer 2\nrows 64–127", [(1, "", WAIT)] + [(1, f"wgmma k{i}", TENSOR) for i in range(7)] + [(1, "…", TENSOR)]),
        ("TMA store", [(2, "tile before →", STORE), (7, "", WAIT)]),
    ])


def gemv(axes):
    title(axes, 97, "The work: tiles of 64 rows of w × steps of 128 k, numbered tile after tile, dealt evenly")
    per_tile, tiles, blocks = 10, 5, 7
    for tile in range(tiles):
        for step in range(per_tile):
            unit = tile * per_tile + step
            owner = unit * blocks // (tiles * per_tile)
            box(axes, 17 + step * 6.5, 88 - (tile + 1) * 7, 6.5, 7, f"b{owner}", COLOURS[owner], size=8)
    note(axes, 0, 70, "tiles of\n64 rows\nof w")
    note(axes, 49, 91.3, "steps of 128 k", ha="center")
    note(axes, 84, 68, "a tile that is cut\nis summed by the\nblock that is done\nlast, in order of k", fontsize=8.5)
    title(axes, 47, "A block: a loading thread and a warpgroup")
    roles(axes, 45, [
        ("loader", [(2, "fill the ring with w", LOAD), (1.3, "pdl_wait", WAIT), (1.2, "x", LOAD), (4.5, "w, x of step after step", LOAD)]),
        ("warpgroup", [(3.4, "wait for x", WAIT), (1.1, "norm scale", MATH), (3, "wgmma 64 × m8…64 × 128", TENSOR), (1.5, "epilogue", STORE)]),
    ])
    note(axes, 17, 20, "swapped operands: 64 rows of w are the M of wgmma, the 1 to 64 tokens its N (8, 16, 32 or 64).\n"
         "epilogue: bias, rotation and append to the KV cache, silu(gate) · up, or residual and sums of squares.", fontsize=8.5)


def attn_prefill(axes):
    title(axes, 97, "The work: (tile of queries, kv head), longest first; keys newest first")
    for row in range(6):
        for column in range(row + 1):
            diagonal = column == row
            box(axes, 17 + column * 7, 89 - (row + 1) * 6.6, 7, 6.6, str(row - column), COLOURS[5 - row] if not diagonal else "#ffffff", size=8)
    note(axes, 0, 69, "tiles of\nqueries\n× heads\nof a group")
    note(axes, 17, 91.2, "tiles of 128 keys (two pages); the number is the order in which they are read; white: masked")
    note(axes, 64, 80, "row 5 is dealt first, row 0 last:\na ticket counter gives the next\nitem to whoever is free", fontsize=8.5)
    title(axes, 45, "A block (heads of 128): a loader and two consumers that hand the tensor cores round")
    roles(axes, 43, [
        ("loader", [(1, "Q, K0", LOAD), (1, "V0, K1", LOAD), (1, "V1, K2", LOAD), (1, "V2, K3", LOAD), (1, "next item: Q", LOAD)]),
        ("consumer 1", [(0.6, "", WAIT), (1, "S0", TENSOR), (1, "softmax 0", MATH), (1, "S1, P0·V0", TENSOR), (1, "softmax 1", MATH), (1, "S2, P1·V1", TENSOR)]),
        ("consumer 2", [(1.6, "", WAIT), (1, "S0", TENSOR), (1, "softmax 0", MATH), (1, "S1, P0·V0", TENSOR), (1, "softmax 1", MATH)]),
    ])
    note(axes, 17, 11, "S = Q Kᵀ from shared memory; P stays in registers; heads of 64 have three consumers.", fontsize=8.5)


def attn_decode(axes):
    title(axes, 97, "The work: rows × kv heads × pages in one line, cut into equal spans")
    pages = [("row 0, head 0", 5), ("row 0, head 1", 5), ("row 1, head 0", 2), ("row 1, head 1", 2), ("row 2, h0", 1), ("row 2, h1", 1)]
    total, blocks, unit, x = sum(n for _, n in pages), 4, 0, 0.0
    for name, count in pages:
        note(axes, x + count * 100 / total / 2, 90.5, name if count > 1 else "", ha="center", fontsize=8)
        for _ in range(count):
            owner = unit * blocks // total
            box(axes, x, 80, 100 / total, 8, f"b{owner}", COLOURS[owner], size=8)
            unit, x = unit + 1, x + 100 / total
        axes.plot([x, x], [78.5, 89.5], color="#000000", linewidth=1.6)
    note(axes, 0, 74, "a box: one page of 64 tokens; a pair that is cut (row 0, head 1) is merged, in order, by the block that is done last", fontsize=8.5)
    title(axes, 66, "A page in a block: four warps own 16 tokens each")
    for warp in range(4):
        y = 58 - warp * 6
        note(axes, 0, y - 3, f"warp {warp}")
        box(axes, 17, y - 5.5, 22, 5.5, f"K, tokens {warp * 16}–{warp * 16 + 15}", LOAD, size=8)
        box(axes, 41, y - 5.5, 20, 5.5, "S = Q Kᵀ (mma)", TENSOR, size=8)
        box(axes, 63, y - 5.5, 14, 5.5, "exp", MATH, size=8)
        box(axes, 79, y - 5.5, 21, 5.5, "O += P V (mma)", TENSOR, size=8)
    note(axes, 17, 31, "A of mma.sync: the up to 16 query heads of the group. At the end of a segment the four are merged in order.", fontsize=8.5)
    title(axes, 25, "Time")
    roles(axes, 23, [
        ("warp 4", [(2, "span; fill ring: old pages", LOAD), (1, "pdl_wait", WAIT), (1, "newest page", LOAD), (4, "K, V, K, V …", LOAD)]),
        ("warps 0–3", [(3, "", WAIT), (4, "tile after tile", TENSOR), (1, "merge", STORE)]),
    ])


def sample(axes):
    title(axes, 97, "The work: a row of logits, cut into slices for a cluster of up to 8 blocks")
    for row in range(2):
        note(axes, 0, 84 - row * 9, f"row {row}")
        for block in range(8):
            box(axes, 17 + block * 10.3, 81 - row * 9, 10.3, 7, f"block {block}", COLOURS[block], size=8)
    note(axes, 17, 68, "152,064 logits: 19,008 a block, 76 KB of its shared memory; read from global memory once", fontsize=8.5)
    title(axes, 61, "Passes over the slice; a bar is one exchange in the cluster (8 reads of peers at once)")
    steps = [("load, bias,\nmasks,\npenalties", LOAD), ("maximum\n(and sum for\nlogprobs)", MATH), ("top-k:\ncounts in\n256 parts", MATH), ("top-k:\nnext part", MATH), ("top-p:\nmasses in\n256 parts", MATH), ("draw:\nGumbel-max\n(Philox)", TENSOR), ("budget,\nring\n(leader)", STORE)]
    for i, (text, colour) in enumerate(steps):
        box(axes, i * 14.3, 36, 12.6, 16, text, colour, size=8)
        if 0 < i < 6:
            axes.plot([i * 14.3 + 13.4] * 2, [34, 54], color="#000000", linewidth=2)
    note(axes, 0, 30, "A descent instead of a sort: candidates are counted in 256 parts of an interval of distances to the maximum; the part in\n"
         "which the target is reached is the next interval. Masses are fixed-point integers: no order of sums changes a bit.", va="top", fontsize=8.5)
    note(axes, 0, 17, "Budget forcing: every block runs the state machine on its own copy before the draw (what may be drawn, what is forced)\n"
         "and after it; the leader's copy is kept. No launch more, no second read of the logits.", va="top", fontsize=8.5)


def rows_to_blocks(axes, head, rows, block_text, steps, remark):
    title(axes, 97, head)
    for i, (name, colour) in enumerate(rows):
        box(axes, 0, 85 - i * 9, 48, 7.5, name, colour, size=8.5)
        arrow(axes, (49, 88.7 - i * 9), (58, 88.7 - i * 9))
        box(axes, 59, 85 - i * 9, 41, 7.5, block_text.format(i), colour, size=8.5)
    title(axes, 44, "A block")
    roles(axes, 42, steps)
    note(axes, 0, 14, remark, fontsize=8.5, va="top")


def norm(axes):
    rows_to_blocks(axes, "The work: rows of up to 8192, a block for each",
                   [(f"row {i}: hidden values, bf16", COLOURS[i]) for i in range(4)], "block {}: 128 threads, vectors of 8",
                   [("all threads", [(1.2, "weight", LOAD), (1, "pdl_wait", WAIT), (1.3, "row → registers", LOAD), (1.2, "squares", MATH), (1, "block sum", WAIT), (1.3, "scale, store", STORE)])],
                   "The row stays in registers between the two passes, so it is read once. The weight, which nobody writes, is\n"
                   "loaded before the kernel before has ended. Decode has no such launch: its products normalise what they read.")


def quantise(axes):
    rows_to_blocks(axes, "The work: 1024 neighbours of a row to a block, 8 to a thread",
                   [(text, COLOURS[i]) for i, text in enumerate(["row 0: k 0 to 1023, bf16", "row 0: k 1024 to 2047", "row 1: k 0 to 1023", "row 1: k 1024 to 2047"])],
                   "128 threads: 8 groups of 128 that share a scale",
                   [("16 lanes", [(1, "pdl_wait", WAIT), (1.4, "8 values each", LOAD), (1.6, "largest of the 128", MATH), (1.5, "times 448 / largest", MATH), (1.2, "e4m3, scale", STORE)])],
                   "quantise_weight is the same for a whole row, once, when weights are loaded (--quantize fp8): a block for each row,\n"
                   "which is read twice. In decode nobody is launched for this: products quantise what they read.")


def unfused(axes):
    rows_to_blocks(axes, "The work: 16 neighbouring columns to a thread",
                   [(text, COLOURS[i]) for i, text in enumerate(["add_residual: a product's result, bf16", "and the residual stream, in place", "silu_mul: gate, 8 columns of 16, fp32", "and up, the other 8"])],
                   "128 threads: 2048 columns",
                   [("add_residual", [(1, "pdl_wait", WAIT), (1.6, "columns i and i + 8", LOAD), (1.4, "add, round", MATH), (1.5, "squares of 64", MATH), (1.2, "store", STORE)]),
                    ("silu_mul", [(1, "pdl_wait", WAIT), (1.6, "8 of gate, 8 of up", LOAD), (1.4, "silu(gate) · up", MATH), (1.2, "store", STORE)])],
                   "What products of decode do before they write, as kernels of their own: for ponder study ablation.\n"
                   "Rounding and the order of sums are the fused epilogue's, so no bit of the answer changes.")


def embed(axes):
    rows_to_blocks(axes, "The work: rows of a step, a block for each",
                   [(f"row {i}: which token, at which position?", COLOURS[i]) for i in range(4)], "block {}: gathers a row of the table",
                   [("all threads", [(1, "pdl_wait", WAIT), (1.4, "token, position", LOAD), (1.5, "8 values each", LOAD), (1.4, "sums of squares", MATH), (1.2, "store", STORE)])],
                   "Prefill: tokens that the host uploaded. Decode: the token that the sampler wrote into the row's slot, so no host is\n"
                   "asked between two steps. Sums of squares of 64 neighbours go to the norm inside the next product.")


def rope(axes):
    rows_to_blocks(axes, "The work: (chunk of a head, head of q, k, v, row), 8 pairs to a thread",
                   [(text, COLOURS[i]) for i, text in enumerate(["q heads: rotated in place", "k heads: rotated, to their pages", "v heads: copied to their pages", "padding rows: q = 0, nothing appended"])],
                   "threads of a warp: 4 or 8 heads",
                   [("a thread", [(1, "pdl_wait", WAIT), (1.6, "16 bytes, twice", LOAD), (1.4, "norm (if any)", MATH), (1.5, "cos, sin, rotate", MATH), (1.5, "q or page", STORE)])],
                   "Threads of a head speak to each other only for the norm. Decode has it inside the product of q, k and v,\n"
                   "unless the model normalises heads.")


def random(axes):
    rows_to_blocks(axes, "The work: vectors of 8 of a buffer; blocks stride over them",
                   [(f"vectors {i}, {i} + grid, …", COLOURS[i]) for i in range(4)], "block {}",
                   [("a thread", [(2, "Philox, 10 rounds", MATH), (2, "sum of 4 bytes, centred", MATH), (1, "16 bytes", STORE)])],
                   "Element i depends on (seed, i) alone: every target makes the same bits. Used for dummy weights and benches.")


def decode_loop(axes):
    title(axes, 97, "The body of a conditional WHILE node: a decode step, then one warp")
    names = ["embed", "layer 1:\n5 launches", "…", "layer L", "lm head", "sample", "decode_loop"]
    for i, name in enumerate(names):
        box(axes, i * 14.4, 70, 12.4, 14, name, COLOURS[4] if i == 6 else COLOURS[0], size=8.5)
        if i:
            arrow(axes, (i * 14.4 - 2, 77), (i * 14.4, 77))
    axes.add_patch(FancyArrowPatch((92.5, 70), (6, 70), arrowstyle="-|>", mutation_scale=12, connectionstyle="arc3,rad=-0.28", color="#444444"))
    note(axes, 50, 64, "again, while a row is active and the host has not asked for an end", ha="center")
    title(axes, 44, "The warp")
    roles(axes, 42, [("32 lanes", [(1.6, "host's word `until`", LOAD), (1, "pdl_wait", WAIT), (2, "is any row active?", MATH), (2, "set the condition", STORE)])])
    note(axes, 0, 24, "The host writes `until` before it launches a loop, and once more to break in, with a step that has passed already.\n"
         "The word is read while `sample` still runs, so a pass costs the launch of one warp.", fontsize=8.5, va="top")


KERNELS = {
    "embed": (embed, ["embed"]),
    "unfused": (unfused, ["add_residual", "silu_mul"]),
    "norm": (norm, ["rms_norm"]),
    "quantise": (quantise, ["quantise"]),
    "rope": (rope, ["rope_append"]),
    "gemm": (gemm, ["gemm"]),
    "gemv": (gemv, ["gemv"]),
    "attn_prefill": (attn_prefill, ["attn_prefill"]),
    "attn_decode": (attn_decode, ["attn_decode"]),
    "sample": (sample, ["sample"]),
    "decode_loop": (decode_loop, ["decode_loop"]),
    "random": (random, ["random_normal"]),
}


def roofline(axes, kernels, limits):
    """Least time that memory or tensor cores need, against the predicted one."""
    axes.plot([1e-2, 3e3], [1e-2, 3e3], color="#333333", linewidth=1.4)
    axes.text(0.6, 0.85, "roofline", rotation=45, rotation_mode="anchor", fontsize=8.5, color="#333333")
    for index, model in enumerate(dict.fromkeys(k["model"] for k in kernels)):
        chosen = [k for k in kernels if k["model"] == model]
        least = [1e6 * max(k["bytes"] / limits["bytes_per_second"], k["flops"] / limits["flops_per_second"]) for k in chosen]
        axes.scatter(least, [k["us"]["median"] for k in chosen], s=16, label=model, color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"][index % 5])
    axes.set(xscale="log", yscale="log", xlabel="least that memory or tensor cores need, µs", ylabel="predicted, µs")
    axes.set_title("Prediction for an H100, not measured", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7.5, frameon=False, loc="lower right")


def draw(name, predictions):
    kernels = [k for k in predictions["kernels"] if k["kernel"].startswith(tuple(KERNELS[name][1]))]
    figure = plt.figure(figsize=(12.6, 5.4))
    diagram = figure.add_axes((0.01, 0.02, 0.63, 0.96))
    diagram.set(xlim=(-1, 101), ylim=(0, 100))
    diagram.axis("off")
    KERNELS[name][0](diagram)
    if kernels:
        roofline(figure.add_axes((0.71, 0.13, 0.28, 0.78)), kernels, predictions["roofline"])
    # No date, so that the same numbers are the same file.
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    figure.savefig(f"target/{name}.png", dpi=80)
    plt.close(figure)


def numbers(name, predictions):
    lines = pathlib.Path("tests/resources.txt").read_text().splitlines()
    rows = [line.split() for line in lines[1:] if line.split()[0].startswith(tuple(KERNELS[name][1]))]
    text = "What nvcc made of it (tests/resources.txt):\n\n| kernel | threads | registers | spilled bytes |\n|---|---|---|---|\n"
    text += "".join(f"| {r[0]} | {r[1]} | {r[3]} | {int(r[5]) + int(r[6])} |\n" for r in rows)
    kernels = [k for k in predictions["kernels"] if k["kernel"].startswith(tuple(KERNELS[name][1])) and k["model"] == "qwen2.5-32b"]
    if kernels:
        text += "\nPredicted for an H100 at shapes of Qwen2.5-32B (benches/predictions.json), **not yet run on a GPU**:\n\n"
        text += "| shape | MB | GFLOP | µs | % of the roofline |\n|---|---|---|---|---|\n"
        step = max(1, len(kernels) // 6)
        for k in kernels[::step]:
            shape = " ".join(f"{key}={value}" for key, value in k["shape"].items())
            text += f"| {k['name']}: {shape} | {k['bytes'] / 1e6:.1f} | {k['flops'] / 1e9:.2f} | {k['us']['median']} | {k['roofline_percent']} |\n"
    page = FOLDER / f"{name}.md"
    before, _, rest = page.read_text().partition("<!-- numbers -->\n")
    _, end, after = rest.partition("<!-- end of numbers -->")
    page.write_text(f"{before}<!-- numbers -->\n{text}{end}{after}")


def main():
    predictions = json.loads(pathlib.Path("benches/predictions.json").read_text())
    for name in KERNELS:
        draw(name, predictions)
        numbers(name, predictions)


if __name__ == "__main__":
    main()
