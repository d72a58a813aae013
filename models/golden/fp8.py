"""Makes tiny random checkpoints of fp8 weights in every spelling, and what a float64 model of the same quantisation says.

    python3 models/golden/fp8.py [NAME...]

Writes beside itself NAME.safetensors and NAME.json for each model below, as golden.py does. Hugging Face has no such model to ask
on a CPU, so the forward pass is written out here: sums in float64, activations rounded to bf16 where the engine rounds them (a
difference there can move a number to the next e4m3, a sixteenth away), and those that meet fp8 weights quantised: for each token
and each 128 neighbours scale = max / 448 in fp32 and e4m3(x * (448 / max)). Nothing is written unless the same pass, without
rounding and quantisation, agrees with transformers in float64 on the dequantised weights within 1e-4.

Rounding to e4m3 is a step of a sixteenth, so a last bit of bf16, which the order of a sum decides, moves logits nearly as much as
quantisation does: by 0.75 at most and 0.25 in the root mean square, with every number before its rounding changed by 2^-18 of
itself. So answers are shorter than golden.py's and lead by more, and the embeddings are larger, which makes the layers' part of
the logits smaller, and its noise. The scales of a matrix differ by factors up to 4, so that one taken for another is seen.

Needs torch, transformers and safetensors; not needed to build or test.
"""

import argparse
import json

import safetensors.torch
import torch

import golden
from golden import HERE

GROUP = 128  # activations that share a scale, and rows and columns of a block of weights
MOST = 448.0  # the largest e4m3
EMBEDDING = 1.5
GREEDY_TOKENS = 5
MARGIN = 1.5
E4M3 = torch.float8_e4m3fn


def compressed_tensors(strategy, dynamic):
    numbers = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**numbers, "strategy": strategy, "dynamic": False},
                "input_activations": {**numbers, "strategy": "token" if dynamic else "tensor", "dynamic": dynamic},
                "output_activations": None,
            }
        },
    }


def blocks(**more):
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [GROUP, GROUP],
        **more,
    }


# Family, sizes, and how its weights are quantised: rows and columns that share a scale (0: all), the scales' type, their name.
MODELS = {
    "fp8-tensor": {
        "family": "llama",
        "sizes": {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "bias": "", "norm": False, "inner": 256},
        "changes": {"quantization_config": compressed_tensors("tensor", dynamic=False)},
        "unit": (0, 0),
        "scales": ("weight_scale", torch.float32),
    },
    "fp8-channel": {
        "family": "qwen2",
        "sizes": {
            "layers": 2, "heads": 3, "kv_heads": 1, "head_dim": 64, "bias": "qkv", "norm": False, "hidden": 192, "inner": 256
        },
        "changes": {"quantization_config": compressed_tensors("channel", dynamic=True)},
        "unit": (1, 0),
        "scales": ("weight_scale", torch.bfloat16),
    },
    "fp8-block": {
        "family": "qwen3",
        "sizes": {"layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 128, "bias": "", "norm": True, "inner": 256},
        "changes": {"quantization_config": blocks()},
        "unit": (GROUP, GROUP),
        "scales": ("weight_scale_inv", torch.bfloat16),
    },
    "fp8-block-ragged": {
        "family": "qwen3",
        "sizes": {
            "layers": 2, "heads": 3, "kv_heads": 1, "head_dim": 64, "bias": "", "norm": True, "hidden": 192, "inner": 320
        },
        "changes": {
            "quantization_config": blocks(
                modules_to_not_convert=[f"model.layers.1.mlp.{which}_proj" for which in ("gate", "up", "down")]
            ),
        },
        "unit": (GROUP, GROUP),
        "scales": ("weight_scale_inv", torch.float32),
    },
}  # fmt: skip


def spread(values, unit):
    """[n][k], or [..][..] of units of so many rows and columns, to the same shape of so many rows and columns each."""
    for dim, size in enumerate(unit):
        values = values.repeat_interleave(size, dim)
    return values


def quantise(weight, unit, dtype, generator):
    """e4m3 [n][k] and the scales of its units."""
    n, k = weight.shape
    rows, columns = unit[0] or n, unit[1] or k
    counts = -(-n // rows), -(-k // columns)
    factors = 2 ** (2 * torch.rand(*counts, generator=generator) - 1)
    weight = weight.double() * spread(factors, (rows, columns))[:n, :k]
    scales = torch.empty(counts, dtype=dtype)
    for i in range(counts[0]):
        for j in range(counts[1]):
            block = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scales[i, j] = block.abs().max() / MOST
    numbers = weight / spread(scales.double(), (rows, columns))[:n, :k]
    return numbers.clamp(-MOST, MOST).to(E4M3), scales


def make_tensors(name, seed):
    """The tensors as they are stored, and the matrices of fp8 by their names as float64."""
    model = MODELS[name]
    config = model["changes"]["quantization_config"]
    generator = torch.Generator().manual_seed(100 + seed)
    stored, matrices = {}, {}
    for key, x in golden.make_weights(seed, embedding=EMBEDDING, **model["sizes"]).items():
        module = key.removesuffix(".weight")
        if not module.endswith("_proj") or key == module or module in config.get("modules_to_not_convert", []):
            stored[key] = x
            continue
        scale_name, dtype = model["scales"]
        numbers, scales = quantise(x, model["unit"], dtype, generator)
        (n, k), (rows, columns) = x.shape, model["unit"]
        matrices[key] = numbers.double() * spread(scales.double(), (rows or n, columns or k))[:n, :k]
        stored[key] = numbers
        stored[f"{module}.{scale_name}"] = scales[0, 0].clone() if model["unit"] == (0, 0) else scales
        if config.get("activation_scheme") == "static" or name == "fp8-tensor":
            stored[f"{module}.input_scale"] = torch.tensor([0.01])
    return stored, matrices


class Model:
    """The forward pass. `exact`: neither rounding nor quantised activations."""

    def __init__(self, config, stored, matrices, exact):
        self.config, self.matrices, self.exact = config, matrices, exact
        self.tensors = {key: x.double() for key, x in stored.items()} | matrices

    def rounded(self, x):
        return x if self.exact else x.bfloat16().double()

    def quantised(self, x):
        """[tokens][k], bf16."""
        if self.exact:
            return x
        groups = []
        for group in x.float().split(GROUP, dim=-1):
            most = group.abs().amax(-1, keepdim=True)
            inverse = torch.where(most > 0, MOST / most, 0.0)
            numbers = (group * inverse).clamp(-MOST, MOST).to(E4M3)
            groups.append(numbers.double() * (most / MOST).double())
        return torch.cat(groups, -1)

    def linear(self, x, name):
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        x = self.quantised(x) if f"{name}.weight" in self.matrices else x
        return x @ weight.T + (0 if bias is None else bias)

    def norm(self, x, name):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return self.rounded(self.rounded(x * scale) * self.tensors[f"{name}.weight"])

    def heads(self, x, name, positions, rotate):
        """[heads][tokens][dim]."""
        dim = self.config["head_dim"]
        x = self.rounded(self.linear(x, name)).unflatten(-1, (-1, dim)).transpose(0, 1)
        if not rotate:
            return x
        norm = name.replace("_proj", "_norm")
        if f"{norm}.weight" in self.tensors:
            x = self.norm(x, norm)
        frequencies = self.config["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = (positions[:, None] * frequencies).repeat(1, 2)
        a, b = x.chunk(2, -1)
        return self.rounded(x * angles.cos() + torch.cat([-b, a], -1) * angles.sin())

    def attention(self, x, name):
        tokens = len(x)
        positions = torch.arange(tokens, dtype=torch.float64)
        q, k, v = (self.heads(x, f"{name}.{which}_proj", positions, which != "v") for which in "qkv")
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * self.config["head_dim"] ** -0.5
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        return self.rounded(self.linear(self.rounded(mixed), f"{name}.o_proj"))

    def mlp(self, x, name):
        gate, up = (self.linear(x, f"{name}.{which}_proj") for which in ("gate", "up"))
        inner = self.rounded(torch.nn.functional.silu(gate) * up)
        return self.rounded(self.linear(inner, f"{name}.down_proj"))

    def logits(self, ids):
        """Of the last token."""
        x = self.tensors["model.embed_tokens.weight"][torch.tensor(ids)]
        for i in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{i}"
            normed = self.norm(x, f"{name}.input_layernorm")
            x = self.rounded(x + self.attention(normed, f"{name}.self_attn"))
            normed = self.norm(x, f"{name}.post_attention_layernorm")
            x = self.rounded(x + self.mlp(normed, f"{name}.mlp"))
        head = "model.embed_tokens" if self.config["tie_word_embeddings"] else "lm_head"
        return self.linear(self.norm(x[-1:], "model.norm"), head)[0]


def check(config, stored, matrices, ids):
    """The forward pass against transformers on the same weights. Its norms, angles and softmax are fp32 all the same."""
    plain = {key: x for key, x in config.items() if key != "quantization_config"}
    weights = {key: x for key, x in stored.items() if "_scale" not in key} | matrices
    model = golden.make_model(plain, weights, torch.float64)
    ours = Model(config, stored, matrices, exact=True).logits(ids)
    error = (ours - golden.last_logits(model, ids)).abs().max().item()
    assert error < 1e-4, error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models [default: all]")
    names = parser.parse_args().names or MODELS
    torch.set_num_threads(1)
    for seed, name in enumerate(MODELS):
        if name not in names:
            continue
        stored, matrices = make_tensors(name, seed)
        config = golden.make_config(MODELS[name]["family"], MODELS[name]["sizes"], MODELS[name]["changes"])
        model = Model(config, stored, matrices, exact=False)
        cases = [
            golden.make_case(model.logits, length, seed, GREEDY_TOKENS, MARGIN)
            for seed, length in enumerate(golden.PROMPT_TOKENS)
        ]
        check(config, stored, matrices, cases[1]["prompt_ids"])
        safetensors.torch.save_file(stored, HERE / f"{name}.safetensors", metadata={"format": "pt"})
        text = json.dumps({"weights": name, "config": config, "cases": cases})
        (HERE / f"{name}.json").write_text(text + "\n")
        print(name, [min(case["margins"]) for case in cases], flush=True)


if __name__ == "__main__":
    main()
