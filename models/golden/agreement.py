"""How far this engine is from Hugging Face's transformers at real sizes, over the same tokens.

    python3 models/golden/agreement.py benches/models/qwen2.5-7b --weights FOLDER [--device cuda] [--json FILE]

Random weights (real_size.py) are written to FOLDER once. `ponder generate` gets a prompt of random tokens and goes on greedily;
transformers is given all of these tokens, in float32 if the device has room for that, and in bfloat16. At each position, of prefill
and of decode:

    regret   transformers' logit of its own best token less its logit of ours: 0 where both choose the same
    error    of our log-probabilities of the 20 tokens that we find most likely, the largest

transformers' bfloat16 is held against its float32 in the same way, which says what rounding alone does. Exit code 1: the mean
regret is more than LIMIT, of logits with a standard deviation of 4; 77: there is no torch, no transformers, no numpy or no GPU.

Needs torch, transformers and numpy; not needed to build or test. Not yet run on a GPU.
"""

import argparse
import gc
import json
import pathlib
import subprocess
import sys

try:
    import numpy
    import torch
    import transformers

    import real_size
except ImportError as e:
    print(f"skipped: {e}".lower())
    sys.exit(77)

LIMIT = 0.1
TOP = 20


def ours(args, prompt):
    """The tokens of the answer; and for each token but the first of prompt and answer what we found likely in its place."""
    command = [args.ponder, "generate", args.weights, "--device", args.device.replace("cuda", "cuda:0"), "--json"]
    command += ["--prompt-ids", ",".join(map(str, prompt)), "--max-tokens", str(args.output_tokens), "--ignore-eos"]
    command += ["--temperature", "0", "--thinking", "none", "--logprobs", str(TOP), "--prompt-logprobs", str(TOP)]
    command += ["--max-context", str(len(prompt) + args.output_tokens), "--max-sequences", "1"]
    answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    places = [place["top"] for place in answer["prompt_logprobs"] + answer["logprobs"]]
    return answer["token_ids"], [([t["id"] for t in top], [t["logprob"] for t in top]) for top in places]


@torch.inference_mode()
def theirs(args, dtype, tokens):
    """[tokens - 1][vocab]: the logits of every place but the first."""
    model = transformers.AutoModelForCausalLM.from_pretrained(args.weights, dtype=dtype).to(args.device).eval()
    logits = model(input_ids=torch.tensor([tokens[:-1]], device=args.device), use_cache=False).logits[0].float().cpu()
    del model
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return logits


def summary(regret, error):
    """Of some places."""
    return {
        "places": len(regret),
        "same_token": (regret == 0).float().mean().item(),
        "mean_regret": regret.mean().item(),
        "p99_regret": torch.sort(regret).values[-(-len(regret) * 99 // 100) - 1].item(),
        "largest_regret": regret.max().item(),
        "largest_error": error.max().item(),
    }


def compare(logits, ids, logprobs, prompt_tokens):
    """`ids`, `logprobs`: [places][TOP] of the one that is judged, the best first; `logits` of the other."""
    regret = logits.max(-1).values - logits.gather(-1, ids[:, :1])[:, 0]
    error = (logits.log_softmax(-1).gather(-1, ids) - logprobs).abs().max(-1).values
    # The answer's first token is drawn from the prompt's last row.
    return {
        "prefill": summary(regret[:prompt_tokens], error[:prompt_tokens]),
        "decode": summary(regret[prompt_tokens:], error[prompt_tokens:]),
    }


def fits(args, dtype):
    """Whether the device has memory for the model with so much for each weight, and some to work in."""
    if args.device != "cuda":
        return True
    weights = sum(path.stat().st_size for path in args.weights.glob("*.safetensors")) // 2 * dtype.itemsize
    return weights * 1.1 + 4e9 < torch.cuda.mem_get_info()[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, help="folder with a config.json")
    parser.add_argument("--weights", type=pathlib.Path, required=True, help="folder for random weights")
    parser.add_argument("--ponder", default="target/release/ponder", help="the engine's binary")
    parser.add_argument("--device", choices=["cuda", "host"], default="cuda")
    parser.add_argument("--input-tokens", type=int, default=2048)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    on_cpu = args.device == "host"
    if not on_cpu and not torch.cuda.is_available():
        print("skipped: no gpu that torch can use")
        sys.exit(77)

    config = json.loads((args.model / "config.json").read_text())
    if not (args.weights / "model.safetensors.index.json").exists():
        real_size.write(args.weights, config)
    prompt = numpy.random.default_rng(0).integers(0, config["vocab_size"], args.input_tokens).tolist()
    answer, places = ours(args, prompt)
    args.device = "cpu" if on_cpu else args.device
    ids, logprobs = (torch.tensor(column) for column in zip(*places))
    tokens = prompt + answer

    results, exact = {}, None
    for dtype in (torch.float32, torch.bfloat16):
        if not fits(args, dtype):
            continue
        name = str(dtype).removeprefix("torch.")
        logits = theirs(args, dtype, tokens)
        results[f"ours against {name}"] = compare(logits, ids, logprobs, len(prompt))
        if exact is None:
            exact = logits
        else:
            top = logits.log_softmax(-1).topk(TOP)
            results[f"{name} against float32"] = compare(exact, top.indices, top.values, len(prompt))
    report = {
        "schema": "ponder-agreement",
        "model": str(args.model),
        "input_tokens": len(prompt),
        "output_tokens": len(answer),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "results": results,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    for name, phases in results.items():
        for phase, s in phases.items():
            print(
                f"{name:<26} {phase:<8} {s['places']:>5} places, {100 * s['same_token']:6.2f} % the same token, regret"
                f" {s['mean_regret']:.4f} mean {s['p99_regret']:.4f} p99, largest error {s['largest_error']:.3f}"
            )
    regrets = [s["mean_regret"] for name, phases in results.items() if "ours" in name for s in phases.values()]
    sys.exit(0 if regrets and max(regrets) <= LIMIT else 1)


if __name__ == "__main__":
    main()
