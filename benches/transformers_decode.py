"""Greedy decoding of a model folder by Hugging Face transformers on the CPU, batch 1: the yardstick beside `ponder generate`.

    python3 benches/transformers_decode.py models/modulo

Prints one JSON object: tokens per second (median of five runs of 200 tokens, after a warm-up) in bfloat16 and float32, as many
threads as there are cores. Needs torch and transformers; nothing else in this repository does.
"""

import argparse
import json
import os
import statistics
import time

import torch
import transformers

PROMPT = "<|im_start|>user\nFind x with 7x + 4 = 1 (mod 11).<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 200
RUNS = 5


def tokens_per_second(folder, dtype):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")

    def run(tokens):
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(**ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
        return time.perf_counter() - start

    run(10)
    # The difference of two lengths leaves the prefill out.
    return statistics.median(TOKENS / (run(TOKENS + 1) - run(1)) for _ in range(RUNS))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    folder = parser.parse_args().model
    torch.set_num_threads(os.cpu_count())
    result = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": os.cpu_count()}
    for dtype in (torch.bfloat16, torch.float32):
        result[str(dtype).removeprefix("torch.")] = round(tokens_per_second(folder, dtype), 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
