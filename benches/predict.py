"""What every kernel should take on an H100, written down before anybody has measured it.

    python3 benches/predict.py          # after `cargo build --release`; writes benches/predictions.json, docs/predictions.md

The launches (kernel, grid, cluster, shared memory, bytes, FLOPs) are those of the real host code: `ponder bench kernels` runs on
tests/fake/cuda.c, a driver that only writes down what it is asked for. The machine code is read from the cubins: the instructions
of each kernel's main loop. The model that turns both into microseconds is in this file, and docs/predictions.md says it in words.
Needs a C compiler, and cuobjdump in .toolchain (`make setup`).
"""

import collections
import glob
import heapq
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

# ---- the machine: an H100 SXM ----

PROCESSORS = 132
BYTES = 3.352e12  # per second, of which a stream of reads gets
READABLE = 0.955
FLOPS = 989.4e12  # per second: 4096 a clock and processor, at 1.83 GHz
CLOCK = 1.755e9  # that it keeps when all of it is busy
POWER = 820e12  # FLOP/s that 700 W pay for on random data: nobody's product of 8192 is much faster
LATENCY = 0.8  # us from a read of HBM to its data, with all others reading, too
LAUNCH = 2.2  # us between two events around a kernel that does nothing
MERGE = 1.2  # us to write parts, take a ticket, read them and sum them up
TENSOR = 2048  # bf16 multiply-adds a clock and processor; twice as many of e4m3
POWER_FP8 = 1550e12  # what DeepGEMM reaches with e4m3 on an H800
ISSUE = 4  # warp instructions a clock and processor
EXPONENTIALS = 16  # a clock and processor
# Of the softmax, the part that does not hide behind the tensor cores. FlashAttention 3, the same design, reaches 620 TFLOP/s at
# d 128 and 16k causal: about 3,080 clocks for a tile of 128 x 128 whose products need 2,048. Were its loop as long as ours was
# when this was written, 552 instructions, that would leave this.
EXPOSED = 0.93
PRODUCTS = ("HGMMA", "QGMMA", "HMMA")
# What no way through a loop may leave out.
WORK = (*PRODUCTS, "MUFU")
CONVERT = 11  # instructions that a lane spends on 8 numbers of e4m3, to make them f16
BARRIER = 0.9  # us: a barrier of a cluster of eight, with the reduction before it
PUBLISH = 1.5  # us: a record to host memory, a fence, a ticket
STEP_FP8 = 300  # clocks: barriers, shared memory and products that a step of a decode product of fp8 waits for
SCALED = 2.8  # instructions that scale and add a step's sums, for each token: not counted, since a loop need not pass there
LOGIT = 8  # instructions that a pass of the sampler spends on a logit
COUNT = 6  # clocks of a warp's atomics on 100 counters in shared memory: two or three lanes meet

# (case, yardstick, TFLOP/s). Published on an H100 SXM: cuBLAS by the author of fast.cu; FlashAttention 3 for batches of 16k tokens.
FIGURES = [
    (("square", "product", "rows", 4096), "cuBLAS", 716),
    (("square", "product", "rows", 8192), "cuBLAS", 795),
    (("llama-3.1-8b", "prefill", "rows", 4096), "FlashAttention 3", 590),
    (("llama-3.1-8b", "prefill", "rows", 8192), "FlashAttention 3", 614),
    (("llama-3.1-8b", "prefill", "rows", 16384), "FlashAttention 3", 621),
]

# (case, what counts, at least; of microseconds, at most).
GOALS = [
    (("square", "product", "rows", 8192), "tflop_per_s", 800),
    (("llama-3.1-8b", "prefill", "rows", 4096), "tflop_per_s", 580),
    (("llama-3.1-8b", "prefill", "rows", 16384), "tflop_per_s", 600),
    (("llama-3.1-8b", "decode", "keys", 16 * 8192), "gb_per_s", 3000),
    (("llama-3.2-1b", "decode", "keys", 16 * 8192), "gb_per_s", 2900),
    (("qwen2.5-32b", "decode", "keys", 16 * 8192), "gb_per_s", 2900),
    (("qwen2.5-32b", "greedy", "rows", 1), "us", 15),
    (("qwen2.5-32b", "top_k_top_p", "rows", 1), "us", 15),
    (("qwen2.5-32b", "gate_up", "rows", 1), "roofline_percent", 90),
    (("qwen2.5-32b", "down", "rows", 1), "roofline_percent", 90),
    (("qwen2.5-32b", "o", "rows", 1), "roofline_percent", 90),
    (("qwen2.5-32b", "norm", "rows", 8192), "gb_per_s", 3000),
]


# ---- what the host launches ----


def resources():
    """Kernel -> its line of tests/resources.txt."""
    lines = pathlib.Path("tests/resources.txt").read_text().splitlines()
    names = lines[0].split()
    return {row.split()[0]: dict(zip(names[1:], map(int, row.split()[1:]))) for row in lines[1:]}


def launches(table):
    """The cases of `ponder bench kernels`, each with grid, cluster and shared_bytes."""
    with tempfile.TemporaryDirectory() as folder:
        report = f"{folder}/kernels.json"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", f"{folder}/libcuda.so.1", "tests/fake/cuda.c"], check=True)
        # Tensor maps are aligned to 64 bytes, and parameters begin at 0x210: 48 bytes lie between.
        kernels = " ".join(f"{name} {k['params'] - (48 if k['UTMALDG'] else 0)} {k['threads']}" for name, k in table.items())
        environment = dict(os.environ, LD_LIBRARY_PATH=folder, FAKE_KERNELS=kernels, FAKE_FREE="2000000000")
        command = ["target/release/ponder", "bench", "kernels", "--device", "cuda:0", "--seconds", "0", "--json", report]
        with open(f"{folder}/log", "w+") as log:
            code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=log).returncode
            log.seek(0)
            if code:
                sys.exit(f"cargo build --release, then again: {log.read().splitlines()[-1]}")
            calls = [line.removeprefix("cuda: ") for line in log.read().splitlines()]
        cases = json.loads(pathlib.Path(report).read_text())["results"]
    # What is measured stands between two events.
    timed = [c for before, c, after in zip(calls, calls[1:], calls[2:]) if before == after == "record event" and c.startswith("launch")]
    runs = len(timed) // len(cases)
    assert len(timed) == runs * len(cases), f"{len(timed)} launches for {len(cases)} cases"
    for case, call in zip(cases, timed[::runs]):
        kernel, x, y, z, shared = re.match(r"launch (\S+) grid (\d+) (\d+) (\d+) block \d+ shared (\d+)", call).groups()
        assert kernel == case["kernel"]
        cluster = re.search(r"attribute 4 = (\d+)", call)
        case["grid"] = int(x) * int(y) * int(z)
        case["cluster"] = int(cluster[1]) if cluster else 1
        case["shared_bytes"] = int(shared)
    return cases


# ---- what the compiler made ----


def main_loop(sass):
    """The mix of an iteration of the loop that works: of the innermost loops those with the most matrix products (without any, the
    longest), of these the shortest, in it the shortest way that leaves out no product and no exponential. Loops are found in the control flow, since the
    compiler moves parts of them away."""
    code = [(int(a, 16), text) for a, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass, re.M)]
    names = [re.sub(r"^@\S+\s+", "", text).split()[0].split(".")[0] for _, text in code]
    index = {address: i for i, (address, _) in enumerate(code)}
    after = [[] for _ in code]
    backwards = []
    for i, (_, text) in enumerate(code):
        ends = re.match(r"(BRA|EXIT|RET)\b", text) and not re.search(r"\bBRA\S*\s+!?U?P\d", text)
        if i + 1 < len(code) and not ends:
            after[i].append(i + 1)
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) in index:
            after[i].append(index[int(jump[1], 16)])
            if after[i][-1] <= i:
                backwards.append((after[i][-1], i))
    before = [[] for _ in code]
    for i, following in enumerate(after):
        for j in following:
            before[j].append(i)

    iterations = []
    for head, tail in backwards:
        body, todo = {head}, [tail]
        while todo:
            i = todo.pop()
            if i not in body:
                body.add(i)
                todo += before[i]
        # Only a loop that is entered at its head is one.
        if 0 in body or len(body) < 12:
            continue
        best = {}

        def way(i):
            """From i to the tail: (-work, instructions, next instruction); None where there is none or that goes round."""
            if i == tail:
                return (-(names[i] in WORK), 1, None)
            if i not in best:
                best[i] = None
                ways = [(w[0], w[1], j) for j in after[i] if j in body and j != head and (w := way(j))]
                if ways:
                    work, length, j = min(ways)
                    best[i] = (work - (names[i] in WORK), length + 1, j)
            return best[i]

        if way(head):
            path, i = [], head
            while i is not None:
                path.append(names[i])
                i = way(i)[2]
            iterations.append((body, collections.Counter(path)))
    products = lambda mix: sum(mix[name] for name in PRODUCTS)
    working = [loop for loop in iterations if products(loop[1])] or iterations
    inner = [mix for body, mix in working if not any(other < body for other, _ in working)]
    if not inner:
        return None
    # Without products, what counts is the longest.
    sign = 1 if products(inner[0]) else -1
    mix = min(inner, key=lambda mix: (-products(mix), sign * mix.total()))
    return {"instructions": mix.total(), "products": products(mix), "mix": dict(mix.most_common())}


def machine_code():
    """Kernel -> its main loop, from the cubins of the last build."""
    gemm = max(glob.glob("target/release/build/ponder-*/out/sm_90a-gemm.cubin"), key=os.path.getmtime)
    found = {}
    for cubin in sorted(pathlib.Path(gemm).parent.glob("sm_90a-*.cubin")):
        command = [".toolchain/disassembler/bin/cuobjdump", "-sass", cubin]
        environment = dict(os.environ, PATH=os.path.abspath(".toolchain/disassembler/bin") + ":" + os.environ["PATH"])
        sass = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        for function in sass.split("Function : ")[1:]:
            found[function.split()[0]] = main_loop(function)
    return found


def constants(path):
    """`const NAME: type = number;` of a Rust file."""
    text = pathlib.Path(path).read_text()
    return {name: int(value) for name, value in re.findall(r"const (\w+): \w+ = (\d+);", text)}


# ---- the model: (us, what bounds it, why) ----


def memory(case):
    return case["bytes"] / (BYTES * READABLE) * 1e6


def gemm(case, loop, tiling):
    rows, n, k = (case["shape"][key] for key in ("rows", "n", "k"))
    power = POWER
    if case["op"] == "gemm_fp8":
        # A stage is as many bytes, multiplied in as many clocks, of twice as much k.
        k, power = k / 2, POWER_FP8
    columns, cluster = int(re.search(r"_n(\d+)", case["kernel"])[1]), case["cluster"]
    tile_rows = tiling["TILE_ROWS"]
    tiles = math.ceil(rows / (tile_rows * cluster)) * cluster * math.ceil(n / columns)
    slots = PROCESSORS // cluster * cluster
    waves = math.ceil(tiles / slots)
    stage = tiling["STAGE_K"]
    tensor = tile_rows * columns * stage / TENSOR
    rate = min(tiling["L2_RATE_OF_ONE"], tiling["L2_RATE"] / min(tiles, slots))
    loads = (tile_rows + columns / cluster) * stage * 2 / rate
    result = tiling["RESULT"] + tiling["RESULT_PER_COLUMN"] * columns
    # Of two warpgroups, eight warps.
    issue = 8 * loop["instructions"] / ISSUE if loop else 0
    step = max(tensor, loads, issue)
    clocks = tiling["START"] + waves * (math.ceil(k / stage) * step + result)
    by_clock, by_power, by_memory = clocks / CLOCK * 1e6, case["flops"] / power * 1e6, memory(case) + LATENCY
    us = LAUNCH + max(by_clock, by_power, by_memory)
    # Of the products that the chip could have made in these waves, those that were asked for.
    fill = rows * n / (waves * slots * tile_rows * columns)
    case |= {"tiles": tiles, "waves": waves, "fill": fill}
    quantised = f"{tiles} tiles in {waves} wave{'s' * (waves > 1)} of {slots}: {100 * fill:.0f} % of them wanted"
    if by_memory >= max(by_clock, by_power):
        return us, "memory", f"operands from HBM; {quantised}"
    if by_power >= by_clock:
        return us, "power", f"{quantised}; the tensor cores would be faster than 700 W"
    bound = "tensor" if step == tensor else "L2" if step == loads else "issue"
    return us, bound if fill > 0.85 else "waves", quantised


def gemv(case, loop, tiling):
    fp8 = case["op"] == "gemv_fp8"
    steps = math.ceil(case["shape"]["n"] / 64) * math.ceil(case["shape"]["k"] / (256 if fp8 else 128))
    share = math.ceil(steps / case["grid"])
    # Of fp8 a step's instructions come before and behind its products, and not beside them: their latencies count, too.
    warps = case["threads"] // 32 - 1
    tokens = int(case["kernel"].rsplit("_m", 1)[1])
    issue = share * (warps * (loop["instructions"] + SCALED * tokens) / ISSUE + STEP_FP8) / CLOCK * 1e6 if fp8 else 0
    us = LAUNCH + LATENCY + max(memory(case), issue) + MERGE
    if issue > memory(case):
        return us, "issue", f"{share} steps of 16 KB a block, with more instructions than bytes"
    return us, "memory" if memory(case) > LAUNCH + LATENCY + MERGE else "latency", f"{share} steps of 16 KB a block; start and merge"


def attn_prefill(case, loop, tiling):
    shape = case["shape"]
    dim, group = shape["head_dim"], shape["q_heads"] // shape["kv_heads"]
    # One warpgroup loads, each of the others has 64 rows of queries.
    rows = 64 * (case["threads"] // 128 - 1)
    tokens = rows // group
    pairs = case["flops"] // (4 * shape["q_heads"] * dim)
    tensor = 2 * rows * 128 * dim / TENSOR
    softmax = max(rows / 16 * loop["instructions"] / ISSUE, rows * 128 / EXPONENTIALS)
    # Of fp8, two tiles are converted by three warps.
    convert = 2 * 128 * dim / 8 / 32 * CONVERT / ISSUE if case["name"] == "fp8" else 0
    tile = max(tensor, softmax) + EXPOSED * (min(tensor, softmax) + convert)
    item = 800  # clocks: its first product waits, its result leaves
    if shape["sequences"] == 1:
        starts = range(shape["keys"] - shape["rows"], shape["keys"], tokens)
        keys = sorted((math.ceil(min(start + tokens, shape["keys"]) / 128) for start in starts), reverse=True)
        # The block that is free first takes the longest that is left.
        blocks = [0.0] * case["grid"]
        for i in range(len(keys) * shape["kv_heads"]):
            heapq.heapreplace(blocks, blocks[0] + keys[i // shape["kv_heads"]] * tile + item)
        clocks = max(blocks)
        balance = sum(blocks) / (PROCESSORS * clocks)
    else:
        # Sequences' lengths are not in the report: half a tile is lost at each diagonal, the work is dealt almost evenly.
        tiles = shape["rows"] / tokens + shape["sequences"] / 2
        total = (pairs / (tokens * 128) + tiles / 2) * shape["kv_heads"] * tile + tiles * shape["kv_heads"] * item
        balance = 0.95
        clocks = total / PROCESSORS / balance
    us = LAUNCH + LATENCY + clocks / CLOCK * 1e6
    why = f"{rows} queries by 128 keys: {tensor:.0f} clocks of products, {softmax:.0f} of softmax; processors busy {100 * balance:.0f} %"
    return us, "waves" if balance < 0.8 else "tensor" if tensor > softmax else "softmax", why


def attn_decode(case, loop, tiling):
    shape = case["shape"]
    units = shape["sequences"] * shape["kv_heads"] * math.ceil(shape["keys"] / shape["sequences"] / 64)
    share = math.ceil(units / case["grid"])
    # Of a page, two copies: one block's stream has a latency at its start, then its share of HBM.
    even = units / (share * case["grid"])
    us = LAUNCH + 2 * LATENCY + memory(case) / even + MERGE
    return us, "memory" if memory(case) > LAUNCH + MERGE else "latency", f"{share} pages a block, {100 * even:.0f} % even; block table, start, merge"


def sample(case, loop, tiling):
    # The maximum, with a reduction; of top-k and top-p each a descent of two steps; the draw.
    passes = 1 if case["name"] == "greedy" else 6
    logits = case["shape"]["vocab"] / case["cluster"] / 32  # of a warp's width, in a block
    clocks = passes * logits * LOGIT / ISSUE
    # The first step of top-k counts all, later ones few.
    clocks += logits * COUNT if passes > 1 else 0
    waves = math.ceil(case["grid"] / (PROCESSORS // case["cluster"] * case["cluster"]))
    us = LAUNCH + waves * (LATENCY + PUBLISH + passes * BARRIER + clocks / CLOCK * 1e6) + memory(case)
    return us, "latency", f"{passes} passes and reductions over a cluster of {case['cluster']}, {waves} waves"


def rows(case, loop, tiling):
    us = LAUNCH + LATENCY + memory(case)
    return us, "memory" if memory(case) > LAUNCH + LATENCY else "latency", "a row is read once and written once"


MODEL = {"gemm": gemm, "gemv": gemv, "gemm_fp8": gemm, "gemv_fp8": gemv, "attn_prefill": attn_prefill, "attn_decode": attn_decode, "sample": sample}


def is_case(kernel, case):
    model, name, key, value = case
    return (kernel["model"], kernel["name"], kernel["shape"].get(key)) == (model, name, value)


def predict(case, use, loop, tiling):
    case["threads"] = use["threads"]
    flops = case["flops"] / (2 if case["op"].endswith("_fp8") else 1)
    us, bound, why = MODEL.get(case["op"], rows)(case, loop, tiling)
    seconds = us * 1e-6
    del case["us"], case["roofline_percent"]
    return case | {
        "us": {"median": round(us, 2)},
        "gb_per_s": round(case["bytes"] / seconds / 1e9, 1),
        "tflop_per_s": round(case["flops"] / seconds / 1e12, 2),
        "roofline_percent": round(100 * max(case["bytes"] / BYTES, flops / FLOPS) / seconds, 1),
        "bound": bound,
        "why": why,
        "yardsticks": [
            {"yardstick": name, "what": "published", "us": {"median": round(case["flops"] / figure / 1e6, 2)}}
            for figured, name, figure in FIGURES
            if is_case(case, figured)
        ],
    }


# ---- the document ----


def ring(kernel, shared_bytes):
    """(copies that may be on their way, bytes of each) of kernels that load through a ring in shared memory, else None."""
    of_family = lambda family, name: re.search(rf"{name} = (.*?);", pathlib.Path(f"kernels/{family}.cu").read_text())[1]
    if kernel.startswith("gemm"):
        columns = int(re.search(r"_n(\d+)", kernel)[1])
        stage, result = (128 + columns) * 64 * 2, 128 * columns * (1 if "silu" in kernel else 2)
        if "fp8" in kernel:
            stage += (128 + columns // 8) * 4
        return min(int(of_family("gemm", "kMostStages")), (shared_bytes - 512 - result) // stage), stage
    if kernel.startswith("gemv"):
        # "kConverts || kTokens <= 16 ? 5 : kTokens == 32 ? 4 : 3"
        numbers = [int(n) for n in re.findall(r"[?:] (\d+)", of_family("gemv", "int kStages"))]
        tokens = int(kernel.rsplit("_m", 1)[1])
        return numbers[0 if "fp8" in kernel and tokens <= 32 else max(0, tokens.bit_length() - 5)], 64 * 256
    if kernel.startswith("attn"):
        family, dim = kernel.removesuffix("_fp8").rsplit("_d", 1)
        bytes_ = 1 if kernel.endswith("_fp8") else 2
        if family == "attn_decode":
            return 65536 // (64 * int(dim) * bytes_), 64 * int(dim) * bytes_
        if bytes_ == 1:
            return 32768 // (128 * int(dim)), 128 * int(dim)
        stages = (re.findall(r"\d+", of_family(family, name)) for name in ("kKeyStages", "kValueStages"))
        return sum(int(numbers[1 if dim == "64" else 2]) for numbers in stages), 128 * int(dim) * 2
    return None



def shape_text(shape):
    short = {"q_heads": "q", "kv_heads": "kv", "head_dim": "d", "sequences": "seqs"}
    return " ".join(f"{short.get(k, k)}={v}" for k, v in shape.items() if k != "causal")


def document(kernels, table, loops):
    text = f"""# Predictions

Written by benches/predict.py before any of these kernels had run on a GPU: **not measured**. To be held against benches/gpu.sh.

The launches are those of the host code for an H100 SXM ({PROCESSORS} processors); instructions are counted in the machine code.
% of the roofline: the least time that {BYTES / 1e12:.2f} TB/s or {FLOPS / 1e12:.0f} TFLOP/s allow, of the predicted one. What is
predicted is what `ponder bench kernels` measures: one launch between two events, L2 cold, random data.

## The model

- **Fixed costs**: {LAUNCH} us between two events around a kernel that does nothing; {LATENCY} us until the first bytes come from HBM
  under load; {MERGE} us to merge parts by ticket.
- **Memory**: {100 * READABLE:.1f} % of {BYTES / 1e12:.2f} TB/s, the best that streams of reads are known to get. By Little's law that needs
  {BYTES * READABLE * LATENCY * 1e-6 / PROCESSORS / 1024:.0f} KB in flight on every processor; the table of kernels says what each has room for.
- **Products** (gemm): waves x (k / 64 x the slowest of tensor cores, L2 and instruction issue + the result), with the constants of
  engine/tiling.rs at {CLOCK / 1e9:.3f} GHz. Tiles are dealt in waves, so what counts is how much of the last wave is wanted ("wanted"
  below: results asked for, of those the waves could make). Never faster than {POWER / 1e12:.0f} TFLOP/s, which is what 700 W have been
  seen to pay for on random data, nor than memory. Where few processors have a tile, each gets up to 64 bytes a clock from L2.
- **Products of fp8**: the same clocks for twice as much k; never faster than {POWER_FP8 / 1e12:.0f} TFLOP/s, what DeepGEMM gets of an H800. In decode a
  step of 16 KB takes {STEP_FP8} clocks, the instructions of its loop and {SCALED} for each token, or the time in which its bytes come, whichever
  is longer.
  % of the roofline: of twice the FLOP/s.
- **Attention of prompts**: for a tile of queries by 128 keys, the clocks of both products and of the softmax (its instructions, {ISSUE} a
  clock for the warps that work; at least the exponentials, {EXPONENTIALS} a clock): the longer of the two plus {EXPOSED} of the shorter. {EXPOSED} makes a loop of 552
  instructions as fast as FlashAttention 3, which is built the same, is known to be; a shorter loop is predicted to be faster. Work
  items are dealt as the kernel deals them, the longest first to whoever is free; the last processor counts.
- **Products and attention of decode**: the bytes at the speed of memory, plus fixed costs. The tensor cores have an order of
  magnitude to spare.
- **Sampling**: {BARRIER} us for every reduction over a cluster, {LOGIT} instructions for a logit in every pass, {COUNT} clocks for a warp's
  atomics in the first step of top-k, {PUBLISH} us to publish; two steps for each of top-k and top-p. In a captured step the kernel
  before hides most of the {LAUNCH} us of the launch.
- **Norms, embedding, rotation**: bytes plus fixed costs.

Least certain: the exposed part of the softmax, the power limit (it depends on the board), the sampler's barriers and atomics.

## Against the goals

| model | for | shape | kernel | predicted | goal |
|---|---|---|---|---|---|
"""
    units = {"tflop_per_s": "TFLOP/s", "gb_per_s": "GB/s", "roofline_percent": "% of the roofline", "us": "us"}
    for case, what, least in GOALS:
        k = next(k for k in kernels if is_case(k, case))
        value = k["us"]["median"] if what == "us" else k[what]
        goal = f"at most {least}" if what == "us" else least
        text += f"| {k['model']} | {k['name']} | {shape_text(k['shape'])} | {k['kernel']} | {value:.0f} {units[what]} | {goal} |\n"
    text += f"""
## The kernels

Main loop: of the innermost loops with most matrix instructions the shortest, and in it the shortest way; per warp and iteration. Ring: copies
that may be on their way at once, on one processor, which Little's law asks {BYTES * READABLE * LATENCY * 1e-6 / PROCESSORS / 1024:.0f} KB of.

| kernel | registers | KB shared | blocks a processor | ring, KB | loop: instructions | HGMMA, QGMMA or HMMA | instructions for each | of these |
|---|---|---|---|---|---|---|---|---|
"""
    shared = {k["kernel"]: k["shared_bytes"] for k in kernels}
    for name, use in table.items():
        if name not in shared:
            continue
        bytes_ = shared[name] + use["shared"]
        fit = min(65536 // (use["threads"] * -(-use["registers"] // 8) * 8), 2048 // use["threads"], 228 * 1024 // max(bytes_, 1024), 32)
        loop = loops.get(name)
        each = f"{loop['instructions'] / loop['products']:.1f}" if loop and loop["products"] else ""
        mix = ", ".join(f"{n} {i}" for i, n in list(loop["mix"].items())[:7]) if loop else "no loop"
        copies = ring(name, shared[name])
        in_flight = f"{copies[0]} x {copies[1] // 1024} = {copies[0] * copies[1] // 1024}" if copies else ""
        text += (
            f"| {name} | {use['registers']} | {bytes_ / 1024:.0f} | {fit} | {in_flight} | {loop['instructions'] if loop else ''} |"
            f" {loop['products'] or '' if loop else ''} | {each} | {mix} |\n"
        )
    titles = {
        "gemm": "Products of prompts",
        "gemv": "Products of decode",
        "gemm_fp8": "Products of prompts, fp8",
        "gemv_fp8": "Products of decode, fp8",
        "attn_prefill": "Attention of prompts",
        "attn_decode": "Attention of decode",
        "sample": "Sampling",
        "norm": "Norms",
        "rope": "Rotation",
        "embed": "Embedding",
        "random": "Random weights",
    }
    for op, title in titles.items():
        compute = op in ("gemm", "gemm_fp8", "attn_prefill")
        text += f"\n## {title}\n\n| model | for | shape | kernel | MB | GFLOP | us | {'TFLOP/s' if compute else 'GB/s'} | % roofline | bound | why |\n"
        text += "|---|---|---|---|---|---|---|---|---|---|---|\n"
        for k in kernels:
            if k["op"] != op or (op in ("norm", "rope", "embed") and k["shape"]["rows"] not in (1, 16, 2048, 8192)):
                continue
            kernel = k["kernel"] + (" in pairs" if op in ("gemm", "gemm_fp8") and k["cluster"] == 2 else "")
            rate = f"{k['tflop_per_s']:.0f}" if compute else f"{k['gb_per_s']:.0f}"
            text += (
                f"| {k['model']} | {k['name']} | {shape_text(k['shape'])} | {kernel} | {k['bytes'] / 1e6:.1f} | {k['flops'] / 1e9:.1f} |"
                f" {k['us']['median']:.1f} | {rate} | {k['roofline_percent']:.0f} | {k['bound']} | {k['why']} |\n"
            )
    return text


def main():
    os.chdir(pathlib.Path(__file__).parent.parent)
    sys.setrecursionlimit(100_000)
    table, loops, tiling = resources(), machine_code(), constants("engine/tiling.rs")
    kernels = [predict(case, table[case["kernel"]], loops.get(case["kernel"]), tiling) for case in launches(table)]
    report = {
        "schema": "ponder-predictions",
        "device": "H100 SXM",
        "roofline": {"bytes_per_second": BYTES, "flops_per_second": FLOPS},
        "loops": loops,
    }
    lines = ",\n".join("  " + json.dumps(kernel) for kernel in kernels)
    head = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in report.items())
    pathlib.Path("benches/predictions.json").write_text(f"{{\n{head},\n \"kernels\": [\n{lines}\n ]\n}}\n")
    pathlib.Path("docs").mkdir(exist_ok=True)
    pathlib.Path("docs/predictions.md").write_text(document(kernels, table, loops))


if __name__ == "__main__":
    main()
