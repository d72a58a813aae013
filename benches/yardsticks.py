"""What torch needs for the same work as our kernels: the yardstick beside `ponder bench kernels`.

    ponder bench kernels --json kernels.json && python3 benches/yardsticks.py kernels.json --json yardsticks.json

Products by cuBLAS (the plain product; and, where our kernel fuses something to it, by torch with that done after it),
attention by scaled_dot_product_attention with cuDNN and with flash-attention, norms, embedding and drawing by torch's own
operations. Left out: ragged prefill, whose lengths are not in the report, and what torch has no operation for.

Measured as ours are: between two events, behind a product that reads 128 MiB and so leaves nothing useful in L2, on random
data, several times. A short sleep on the device goes before, so that no launch waits for Python. On the CPU (--device host)
nothing is made cold. Exit code 77: there is no torch, or no GPU. Needs torch.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import sys
import time

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right
except ImportError as e:
    print(f"skipped: {e}".lower())
    sys.exit(77)


class Clock:
    """Times operations on one device."""

    def __init__(self, device, seconds):
        self.device, self.seconds = device, seconds
        if device == "cuda":
            self.matrix, self.vectors = random(8192, 8192), random(8192, 128)

    def once(self, operation):
        """Seconds."""
        if self.device == "cpu":
            start = time.perf_counter()
            operation()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)
        torch.mm(self.matrix, self.vectors)
        before.record()
        operation()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e-3

    def time(self, operation):
        for _ in range(3):
            self.once(operation)
        times = []
        start = time.perf_counter()
        while len(times) < 5 or (len(times) < 1000 and time.perf_counter() - start < self.seconds):
            times.append(self.once(operation) * 1e6)
        return {"median": statistics.median(times), "min": min(times), "max": max(times), "runs": len(times)}


def random(*shape, dtype=torch.bfloat16, deviation=1.0):
    """On the default device."""
    return torch.randn(*shape, dtype=dtype).mul_(deviation)


def products(case):
    """(yardstick, what, operation) of gemm and gemv."""
    rows, n, k = (case["shape"][key] for key in ("rows", "n", "k"))
    x, w = random(rows, k), random(n, k, deviation=0.02)
    out = torch.empty(rows, n, dtype=torch.bfloat16)
    yield "cublas" if x.is_cuda else "torch", "torch.mm", lambda: torch.mm(x, w.t(), out=out)
    if "_bias" in case["kernel"]:
        bias = random(n, deviation=0.02)
        yield "torch", "linear with bias", lambda: F.linear(x, w, bias)
    if "_residual" in case["kernel"]:
        residual = random(rows, n)
        yield "torch", "linear, add", lambda: residual.add_(F.linear(x, w))
    if "_silu" in case["kernel"]:

        def gated():
            gate, up = F.linear(x, w).chunk(2, dim=-1)
            return F.silu(gate) * up

        yield "torch", "linear, silu, multiply", gated


def attention(case):
    shape = case["shape"]
    heads, kv_heads, dim, count = (shape[key] for key in ("q_heads", "kv_heads", "head_dim", "sequences"))
    decode = case["op"] == "attn_decode"
    if case["name"] == "fp8" or count > 1 and not decode:
        return
    queries, keys = shape["rows"] // count, shape["keys"] // count
    q = random(count, heads, queries, dim)
    k, v = random(count, kv_heads, keys, dim), random(count, kv_heads, keys, dim)
    if decode:
        mask, what = {}, "one query per sequence"
    elif queries == keys:
        mask, what = {"is_causal": True}, "causal"
    else:
        mask, what = {"attn_mask": causal_lower_right(queries, keys)}, "causal, the last queries"
    backends = [("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)]
    for name, backend in backends if q.is_cuda else [("torch", SDPBackend.MATH)]:

        def run(backend=backend, **keywords):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, keywords.get("k", k), keywords.get("v", v), enable_gqa=True, **mask)

        yield name, what, run


def norms(case):
    rows, hidden = case["shape"]["rows"], case["shape"]["hidden"]
    x, residual, weight = random(rows, hidden), random(rows, hidden), random(hidden)
    if case["name"] == "norm":
        yield "torch", "rms_norm", lambda: F.rms_norm(x, (hidden,), weight, 1e-6)
    else:
        yield "torch", "add, rms_norm", lambda: F.rms_norm(residual.add_(x), (hidden,), weight, 1e-6)


def embeddings(case):
    rows, hidden, vocab = case["shape"]["rows"], case["shape"]["hidden"], 128_000
    table, ids = random(vocab, hidden), torch.randint(vocab, (rows,))
    yield "torch", "embedding", lambda: F.embedding(ids, table)


def samplers(case):
    rows, vocab = case["shape"]["rows"], case["shape"]["vocab"]
    logits = random(rows, vocab, dtype=torch.float32, deviation=3.0)

    def top_k_top_p():
        values, ids = logits.topk(50, dim=-1)
        p = values.softmax(-1)
        p = p.masked_fill(p.cumsum(-1) - p >= 0.9, 0.0)
        return ids.gather(-1, p.multinomial(1))

    if case["name"] == "greedy":
        yield "torch", "argmax", lambda: logits.argmax(-1)
    else:
        yield "torch", "topk, softmax, cumsum, multinomial", top_k_top_p


OPERATIONS = {
    "gemm": products,
    "gemv": products,
    "attn_prefill": attention,
    "attn_decode": attention,
    "norm": norms,
    "embed": embeddings,
    "sample": samplers,
}


def save(path, report):
    """At once or not at all, because a run may be cut short."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(new, path)


def measure(clock, operation, line, report):
    try:
        line = line | {"us": clock.time(operation)}
    except (RuntimeError, TypeError, ValueError) as e:
        # Such as a backend that does not have this case.
        report["failed"].append(line | {"error": str(e).splitlines()[0]})
        return
    report["results"].append(line)
    print(f"{line['model']:<13} {line['op']:<12} {line['name']:<11} {line['yardstick']:<6} {line['us']['median']:>10.2f} us  {line['what']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", type=pathlib.Path, help="what `ponder bench kernels --json` wrote")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--device", choices=("cuda", "host"), default="cuda")
    parser.add_argument("--seconds", type=float, default=0.05, help="for each line")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no GPU")
        sys.exit(77)
    device = "cuda" if args.device == "cuda" else "cpu"
    torch.set_default_device(device)
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    clock = Clock(device, args.seconds if device == "cuda" else 0)
    report = {
        "schema": "ponder-yardsticks",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "results": [],
        "failed": [],
    }
    for case in json.loads(args.kernels.read_text())["results"]:
        line = {key: case[key] for key in ("name", "model", "op", "shape")}
        try:
            for name, what, operation in OPERATIONS.get(case["op"], lambda case: ())(case):
                line |= {"yardstick": name, "what": what}
                measure(clock, operation, line, report)
        except torch.OutOfMemoryError as e:
            report["failed"].append(line | {"error": str(e).splitlines()[0]})
        save(args.json, report)
    if not report["results"]:
        sys.exit("nothing could be measured: " + json.dumps(report["failed"][:3]))


if __name__ == "__main__":
    main()
