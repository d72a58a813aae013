"""Writes a checkpoint of random weights in the shape of any config.json: many gigabytes that nobody has to fetch or keep.

    python3 models/golden/real_size.py benches/models/qwen2.5-7b FOLDER [--dtype BF16]

FOLDER gets config.json, safetensors files of at most 4 GiB (in bf16; F16 and F32 are for the loader's sake), their index, and a
tokenizer whose words are the numbers of the tokens. Deviations are those of golden.py, made independent of the model's width:
activations stay near 1, so that the logits say whether a kernel is right at this size (agreement.py).

Needs numpy; not needed to build or test.
"""

import argparse
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SHARD_BYTES = 4 << 30
CHUNK = 1 << 24  # elements made at a time


def tensors_of(config):
    """(name, shape, mean, deviation) of each tensor that Hugging Face's class of this config has, in the order of the layers."""
    family = config["model_type"]
    h, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads, dim = config.get("num_key_value_heads", heads), config.get("head_dim") or h // heads
    rows = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * dim}
    bias = "qkv" if family == "qwen2" else "qkvo" if config.get("attention_bias") else ""

    def matrix(name, n, k):
        return (f"{name}.weight", [n, k], 0, k**-0.5)

    table = 0.2 * (128 / h) ** 0.5
    yield ("model.embed_tokens.weight", [vocab, h], 0, table)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield (f"{layer}.input_layernorm.weight", [h], 1.0, 0.2)
        for which, n in rows.items():
            yield matrix(f"{layer}.self_attn.{which}_proj", n, h)
        yield matrix(f"{layer}.self_attn.o_proj", h, rows["q"])
        for which in bias:
            yield (f"{layer}.self_attn.{which}_proj.bias", [rows.get(which, h)], 0, 0.3)
        if family == "qwen3":
            for which in "qk":
                yield (f"{layer}.self_attn.{which}_norm.weight", [dim], 1.0, 0.3)
        yield (f"{layer}.post_attention_layernorm.weight", [h], 1.0, 0.2)
        yield matrix(f"{layer}.mlp.gate_proj", inner, h)
        yield matrix(f"{layer}.mlp.up_proj", inner, h)
        yield matrix(f"{layer}.mlp.down_proj", h, inner)
    yield ("model.norm.weight", [h], 1.7, 0.2)
    if not config.get("tie_word_embeddings"):
        yield ("lm_head.weight", [vocab, h], 0, table)


def shards(tensors, size):
    """Lists of tensors, each with the elements before it in its file, of `size` bytes each."""
    files, at = [[]], 0
    for tensor in tensors:
        elements = int(np.prod(tensor[1]))
        if files[-1] and (at + elements) * size > SHARD_BYTES:
            files.append([])
            at = 0
        files[-1].append((tensor, at))
        at += elements
    return files


def bf16(numbers):
    """Bits of float32 rounded to the nearest."""
    bits = numbers.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype("<u2")


# Bytes of a number, and what makes them of float32.
DTYPES = {"BF16": (2, bf16), "F16": (2, lambda numbers: numbers.astype("<f2")), "F32": (4, lambda numbers: numbers)}


def random(count, mean, deviation, seed):
    numbers = np.random.Generator(np.random.SFC64(seed)).standard_normal(count, np.float32)
    numbers *= np.float32(deviation)
    numbers += np.float32(mean)
    return numbers


def write(folder, config, dtype="BF16"):
    folder.mkdir(parents=True, exist_ok=True)
    size, encode = DTYPES[dtype]
    files, index, seeds = shards(tensors_of(config), size), {}, itertools.count()
    with ThreadPoolExecutor() as pool:
        for i, tensors in enumerate(files):
            name = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
            header = {
                tensor: {
                    "dtype": dtype,
                    "shape": shape,
                    "data_offsets": [at * size, (at + int(np.prod(shape))) * size],
                }
                for (tensor, shape, _, _), at in tensors
            }
            index.update(dict.fromkeys(header, name))
            text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
            text += b" " * (-len(text) % 8)
            with open(folder / name, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.flush()

                def make(work):
                    at, count, mean, deviation, seed = work
                    numbers = encode(random(count, mean, deviation, seed))
                    os.pwrite(file.fileno(), numbers.tobytes(), 8 + len(text) + at * size)

                work = [
                    (at + begin, min(CHUNK, int(np.prod(shape)) - begin), mean, deviation, next(seeds))
                    for (_, shape, mean, deviation), at in tensors
                    for begin in range(0, int(np.prod(shape)), CHUNK)
                ]
                for _ in pool.map(make, work):
                    pass
    words = {str(i): i for i in range(config["vocab_size"])}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer) + "\n")
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # The last of all: where it is, all is.
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text + "\n")
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with a config.json")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="BF16")
    args = parser.parse_args()
    total = write(args.folder, json.loads((args.model / "config.json").read_text()), args.dtype)
    print(f"{args.folder}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
