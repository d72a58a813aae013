"""Makes fixtures.json and scores.json of a model folder: the truth that the tests hold the engine against.

    python3 models/modulo/fixtures.py models/modulo

By Hugging Face transformers in float32 on the stored bf16 weights, eager attention, on the CPU (about half an hour).
fixtures.json: for each prompt of the fixtures.json beside this script, its ids, the last position's logits, 64 greedy tokens
(not stopping at the end of sequence), and by how much the logit of each was above the next best; numbers to 4 decimals. And the
perplexity of the prompts and what follows them, in overlapping windows.
scores.json: 64 problems answered by s1's way at several budgets, at temperature 0: the share that was right, and the mean
number of thinking tokens. Needs torch and transformers; not needed to build or test.
"""

import argparse
import json
import math
import random
import re
from pathlib import Path

import torch
import transformers

from train import THINKING, Problem

GREEDY_TOKENS = 64
PROBLEMS = 64
SEED = 12345
# (maximum, ends ignored)
BUDGETS = [(0, 0), (64, 4), (128, 4), (256, 4), (384, 4), (512, 4), (1024, 0), (1024, 1), (1024, 2), (1024, 3)]
ANSWER_TOKENS = 16
CONTEXT, STRIDE = 60, 25


@torch.inference_mode()
def greedy(model, ids, tokens, stops=(), may_stop_at_once=True):
    """Greedy tokens after `ids`, up to and including a stop, and their margins."""
    made, margins, cache, fed = [], [], None, ids
    while len(made) < tokens:
        out = model(input_ids=torch.tensor([fed]), past_key_values=cache, use_cache=True)
        logits, cache = out.logits[0, -1], out.past_key_values
        if not made and not may_stop_at_once:
            logits[list(stops)] = -torch.inf
        best = torch.topk(logits, 2)
        made.append(best.indices[0].item())
        margins.append((best.values[0] - best.values[1]).item())
        fed = made[-1:]
        if made[-1] in stops:
            break
    return made, margins


@torch.inference_mode()
def case(model, tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    made, margins = greedy(model, ids, GREEDY_TOKENS)
    return {
        "text": text,
        "prompt_ids": ids,
        "last_logits": [round(x, 4) for x in logits.tolist()],
        "greedy_ids": made,
        "margin": [round(x, 4) for x in margins],
    }


@torch.inference_mode()
def perplexity(model, tokenizer, text):
    """Each token is judged once, in the first window that holds it; the first token of all is not."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    surprise, known, begin = 0.0, 1, 0
    while known < len(ids):
        window = ids[begin : begin + CONTEXT]
        logprobs = model(input_ids=torch.tensor([window])).logits[0].log_softmax(-1)
        for i in range(known, begin + len(window)):
            surprise -= logprobs[i - begin - 1, ids[i]].item()
        known, begin = begin + len(window), begin + STRIDE
    tokens, size = len(ids) - 1, len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    return {
        "text": text,
        "context": CONTEXT,
        "stride": STRIDE,
        "tokens": tokens,
        "perplexity": round(math.exp(surprise / tokens), 5),
        "bits_per_byte": round(surprise / math.log(2) / size, 5),
    }


def answer(model, tokenizer, problem, maximum, ignores):
    """One problem under a budget: (right, thinking tokens). The maximum holds for all rounds together."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    messages = [{"role": "user", "content": problem.question()}]
    prompt = encode(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    prompt += encode(THINKING["start"])
    stops = encode("<|im_start|>") + encode("<|im_end|>")
    thinking, ended = [], False
    for left in range(ignores, -1, -1):
        if len(thinking) >= maximum:
            break
        made, _ = greedy(model, prompt + thinking, maximum - len(thinking), stops, may_stop_at_once=not thinking)
        ended = made[-1] in stops
        thinking += made[:-1] if ended else made
        if not ended:
            break
        if left:
            thinking += encode(THINKING["ignore_strings"][0])
            ended = False
    thinking = thinking[:maximum]
    if ended:
        close = THINKING["close"]
    else:
        newline = "" if tokenizer.decode(thinking).endswith("\n") else "\n"
        close = newline + THINKING["end_string"]
    made, _ = greedy(model, prompt + thinking + encode(close), ANSWER_TOKENS, encode("<|im_end|>"))
    said = re.search(r"x = (\d+)", tokenizer.decode(made))
    return bool(said) and int(said[1]) == problem.x, len(thinking)


def scores(model, tokenizer):
    rng = random.Random(SEED)
    problems = [Problem(rng) for _ in range(PROBLEMS)]
    rows = []
    for maximum, ignores in BUDGETS:
        results = [answer(model, tokenizer, p, maximum, ignores) for p in problems]
        rows.append(
            {
                "max_thinking_tokens": maximum,
                "n_ignore": ignores,
                "accuracy": round(sum(right for right, _ in results) / PROBLEMS, 4),
                "average_thinking_tokens": round(sum(n for _, n in results) / PROBLEMS, 1),
            }
        )
        print(rows[-1], flush=True)
    return {
        "problems": PROBLEMS,
        "ignore_string": THINKING["ignore_strings"][0],
        "temperature": 0,
        "seed": SEED,
        "rows": rows,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    folder = parser.parse_args().model
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    fixtures = json.loads(Path(__file__).with_name("fixtures.json").read_text())
    fixtures["cases"] = [case(model, tokenizer, c["text"]) for c in fixtures["cases"]]
    told = [tokenizer.decode(c["prompt_ids"] + c["greedy_ids"]) for c in fixtures["cases"][:4]]
    fixtures["perplexity"] = perplexity(model, tokenizer, "".join(told))
    (folder / "fixtures.json").write_text(json.dumps(fixtures) + "\n")
    (folder / "scores.json").write_text(json.dumps(scores(model, tokenizer), indent=1) + "\n")


if __name__ == "__main__":
    main()
