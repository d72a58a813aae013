"""Makes tiny random checkpoints of every model family and option, and what Hugging Face says of them.

    python3 models/golden/golden.py [NAME...]

Writes beside itself, for each set of weights below, NAME.safetensors (bf16, all biases and an output table included; a model
whose config does not want them leaves them out, here as in Hugging Face), and for each model NAME.json: its config.json, the
set of weights, and two cases, a prompt shorter and one longer than pages, windows and original contexts, each with greedy
tokens, by how much the logit of each was above the next best, and the logits at the prompt's end and before the last token.
All by transformers in float32 on the bf16 weights, eager attention, on the CPU (some minutes); numbers to 3 decimals.

The weights are random, with deviations such that activations stay near 1, scores of attention are spread, and no token's own
embedding decides what comes next. Prompts are drawn until no token of the answer is nearly a tie. No weight is smaller than
2^-14 unless it is 0, so that each is a number of fp16, too, and tests can make the same checkpoint in fp16 and fp32.

Needs torch, transformers and safetensors; not needed to build or test.
"""

import argparse
import json
from pathlib import Path

import safetensors.torch
import torch
import transformers

HERE = Path(__file__).parent
VOCAB = 512
GREEDY_TOKENS = 12
PROMPT_TOKENS = (37, 211)
MARGIN = 0.25

# What a set of weights has: sizes, and whether q, k, v and o have biases and heads of q and k are normalised.
WEIGHTS = {
    "qwen2": {"layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 64, "bias": "qkv", "norm": False},
    "qwen3": {"layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 128, "bias": "qkvo", "norm": True},
    "llama": {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "bias": "qkvo", "norm": False},
}
HIDDEN, INNER = 128, 128

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# Name: weights, and what differs from the family's plain config.
MODELS = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rope_theta": None, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 130,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2-yarn": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0}),
    "qwen3-yarn": (
        "qwen3",
        {
            "rope_theta": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 24,
                "beta_slow": 2,
                "attention_factor": 1.3,
                "truncate": False,
            },
        },
    ),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "llama-llama3": (
        "llama",
        {"rope_theta": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ),
    "llama-bias": ("llama", {"attention_bias": True}),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-linear-parameters": (
        "llama",
        {"rope_theta": None, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.5}},
    ),
    "llama-dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 256}),
    "llama-yarn-mscale": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
            }
        },
    ),
    "mistral": ("llama", {"model_type": "mistral", "sliding_window": 100}),
    "mistral-page": ("llama", {"model_type": "mistral", "sliding_window": 64, "tie_word_embeddings": True}),
    "mistral-no-window": ("llama", {"model_type": "mistral", "sliding_window": None}),
}
CLASSES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}


def make_weights(seed, layers, heads, kv_heads, head_dim, bias, norm, hidden=HIDDEN, inner=INNER, embedding=0.2):
    """Tensors by their names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, mean=0.0, deviation):
        x = (mean + deviation * torch.randn(*shape, generator=generator)).to(torch.bfloat16)
        return torch.where(x.float().abs() < 2**-14, torch.zeros_like(x), x)

    def matrix(rows, columns):
        return random(rows, columns, deviation=columns**-0.5)

    tensors = {
        "model.embed_tokens.weight": random(VOCAB, hidden, deviation=embedding),
        "model.norm.weight": random(hidden, mean=1.7, deviation=0.2),
        "lm_head.weight": random(VOCAB, hidden, deviation=0.2),
    }
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    for i in range(layers):
        name = f"model.layers.{i}."
        for which, n in rows.items():
            tensors[f"{name}self_attn.{which}_proj.weight"] = matrix(n, hidden)
        tensors[f"{name}self_attn.o_proj.weight"] = matrix(hidden, rows["q"])
        for which in bias:
            n = rows.get(which, hidden)
            tensors[f"{name}self_attn.{which}_proj.bias"] = random(n, deviation=0.3)
        if norm:
            for which in "qk":
                tensors[f"{name}self_attn.{which}_norm.weight"] = random(head_dim, mean=1.0, deviation=0.3)
        for which in ("gate", "up"):
            tensors[f"{name}mlp.{which}_proj.weight"] = matrix(inner, hidden)
        tensors[f"{name}mlp.down_proj.weight"] = matrix(hidden, inner)
        tensors[f"{name}input_layernorm.weight"] = random(hidden, mean=1.0, deviation=0.2)
        tensors[f"{name}post_attention_layernorm.weight"] = random(hidden, mean=1.0, deviation=0.2)
    return tensors


def make_config(family, sizes, changes):
    """config.json; null removes a field where the family has no null."""
    config = {
        "architectures": [CLASSES[family] + "ForCausalLM"],
        "model_type": family,
        "hidden_size": sizes.get("hidden", HIDDEN),
        "intermediate_size": sizes.get("inner", INNER),
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["head_dim"],
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    for field, value in changes.items():
        if field == "rope_theta" and value is None:
            del config[field]
        else:
            config[field] = value
    return config


def make_model(config, tensors, dtype=torch.float32):
    """The model, with those of the weights that it wants."""
    model_config = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    model = transformers.AutoModelForCausalLM.from_config(
        model_config, dtype=dtype, attn_implementation="eager"
    ).eval()
    wanted = set(model.state_dict())
    found = {name: x.to(dtype) for name, x in tensors.items() if name in wanted}
    if config["tie_word_embeddings"]:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    assert wanted == set(found), wanted ^ set(found)
    model.load_state_dict(found)
    return model


@torch.inference_mode()
def last_logits(model, ids):
    """No cache, so that nothing depends on how often the model was called."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def answer(logits_of, ids, count, least):
    """Greedy tokens with their margins, and the logits that the first and the last of them are taken from; None where one leads by
    less than `least`."""
    tokens, margins, first = [], [], None
    while len(tokens) < count:
        logits = logits_of(ids + tokens)
        first = logits if first is None else first
        best = torch.topk(logits, 2)
        margin = (best.values[0] - best.values[1]).item()
        if margin < least:
            return None
        tokens.append(best.indices[0].item())
        margins.append(margin)
    return tokens, margins, first, logits


def make_case(logits_of, length, seed, count=GREEDY_TOKENS, least=MARGIN):
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        result = answer(logits_of, ids, count, least)
        if result:
            break
    rounded = lambda numbers: [round(x, 3) for x in numbers]
    tokens, margins, first, last = result
    return {
        "prompt_ids": ids,
        "greedy_ids": tokens,
        "margins": rounded(margins),
        "first_logits": rounded(first.tolist()),
        "last_logits": rounded(last.tolist()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models [default: all]")
    names = parser.parse_args().names or MODELS
    torch.set_num_threads(1)  # the matrices are small
    weights = {name: make_weights(seed, **sizes) for seed, (name, sizes) in enumerate(WEIGHTS.items())}
    for name, tensors in weights.items():
        safetensors.torch.save_file(tensors, HERE / f"{name}.safetensors", metadata={"format": "pt"})
    for name in names:
        of, changes = MODELS[name]
        config = make_config(changes.get("model_type", of), WEIGHTS[of], changes)
        model = make_model(config, weights[of])
        cases = [make_case(lambda ids: last_logits(model, ids), length, seed) for seed, length in enumerate(PROMPT_TOKENS)]
        text = json.dumps({"weights": of, "config": config, "cases": cases})
        (HERE / f"{name}.json").write_text(text + "\n")
        print(name, [min(case["margins"]) for case in cases], flush=True)


if __name__ == "__main__":
    main()
