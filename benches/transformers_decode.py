"""A model in Hugging Face transformers with a static KV cache: the yardstick beside `ponder bench latency`.

    python3 benches/transformers_decode.py models/modulo
    python3 benches/transformers_decode.py benches/models/qwen2.5-7b --load-format dummy --batch 16 --json torch.json

On a GPU a decode step is one CUDA graph, replayed; a prefill is launched operation by operation. On the CPU both are plain
calls; OMP_NUM_THREADS says on how many threads. Prompts are random ids, drawing is greedy, every answer has the length asked for.
`--load-format dummy` makes random weights from config.json. Prints one JSON object. Exit code 77: there is no torch, no
transformers, or no GPU.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

try:
    import torch
    import transformers
except ImportError as e:
    print(f"skipped: {e}".lower())
    sys.exit(77)


class Decoder:
    """One batch: a prefill, then steps."""

    def __init__(self, model, batch, input_tokens, length):
        self.model, self.length = model, length
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=length)
        self.prompt = torch.randint(model.config.vocab_size, (batch, input_tokens))
        self.token = torch.zeros(batch, 1, dtype=torch.long)
        # The position of the next token; the steps count it up themselves, so that they can be replayed.
        self.position = torch.zeros(1, dtype=torch.long)
        self.graph = None

    def prefill(self):
        self.cache.reset()
        tokens = self.prompt.shape[1]
        self.position.zero_()
        self.forward(self.prompt, torch.arange(tokens))
        self.position.add_(tokens)

    def step(self):
        if self.graph:
            self.graph.replay()
        else:
            self.forward(self.token, self.position)
            self.position.add_(1)

    def forward(self, ids, positions):
        # A mask of one's own, because the one that transformers makes asks the device for values.
        visible = torch.arange(self.length)[None, :] <= positions[:, None]
        mask = visible[None, None].expand(ids.shape[0], 1, -1, -1)
        logits = self.model(
            ids,
            past_key_values=self.cache,
            attention_mask=mask,
            position_ids=positions[None].expand(ids.shape[0], -1),
            cache_position=positions,
            logits_to_keep=1,
        ).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def capture(self):
        """Makes a graph of a step. The first steps choose algorithms and allocate, so they come before it."""
        self.prefill()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.forward(self.token, self.position)
            self.position.add_(1)
        self.graph = graph


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(seconds):
    ordered = sorted(seconds)
    percentile = lambda p: ordered[max(0, -(-len(ordered) * p // 100) - 1)] * 1e3
    return {
        **{f"p{p}": percentile(p) for p in (50, 90, 99)},
        "mean": statistics.mean(ordered) * 1e3,
        "min": ordered[0] * 1e3,
        "max": ordered[-1] * 1e3,
    }


def load(folder, dummy, dtype):
    if not dummy:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    config = transformers.AutoConfig.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, help="model folder")
    parser.add_argument("--load-format", choices=("safetensors", "dummy"), default="safetensors")
    parser.add_argument("--device", choices=("auto", "cuda", "host"), default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--input-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="write the result to a file, too")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no GPU")
        sys.exit(77)
    cuda = torch.cuda.is_available() and args.device != "host"
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    torch.set_default_device("cuda" if cuda else "cpu")
    model = load(args.model, args.load_format == "dummy", getattr(torch, args.dtype))
    model.to("cuda" if cuda else "cpu")
    decoder = Decoder(model, args.batch, args.input_tokens, args.input_tokens + args.output_tokens + 4)
    if cuda:
        decoder.capture()

    first, gaps, whole = [], [], []
    for iteration in range(args.iterations + 1):
        synchronize()
        start = time.perf_counter()
        decoder.prefill()
        synchronize()
        now = time.perf_counter()
        prefilled, steps = now - start, []
        for _ in range(args.output_tokens - 1):
            before = now
            decoder.step()
            synchronize()
            now = time.perf_counter()
            steps.append(now - before)
        if iteration > 0:  # the first warms up
            first.append(prefilled)
            gaps += steps
            whole.append(now - start)
    seconds = statistics.median(whole)
    tokens = args.batch * args.output_tokens
    report = {
        "schema": "transformers-decode",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cuda_graph": cuda,
        "args": {key: str(value) if key == "model" else value for key, value in vars(args).items() if key != "json"},
        "results": {
            "time_to_first_token_ms": milliseconds(first),
            "time_per_output_token_ms": milliseconds(gaps) if gaps else None,
            "seconds": seconds,
            "output_tokens_per_second": tokens / seconds,
        },
    }
    text = json.dumps(report)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
