"""Trains the modulo thinking model from nothing on a CPU (about 80 minutes on two cores).

    python3 models/modulo/train.py --out FOLDER [--minutes 80] [--seed 0]

Writes tokenizer and model as transformers does, and thinking.json. The weights in the repository came from four such runs in
a row while the wording of a line was being found, so a new run gives a model like it, not the same one: afterwards make
fixtures.json and scores.json anew (fixtures.py). Needs torch, transformers and tokenizers; not needed to build or test.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

MODULI = [11, 13, 17, 19, 23]
TRIES_PER_ROUND = 5
VOCAB = 512
BATCH_TOKENS = 4096
LEARNING_RATE = 1.5e-3
# The verdict of a line is the one token that takes arithmetic to know.
VERDICT_WEIGHT = 10.0

# Qwen2.5's pre-tokeniser and chat template.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CHAT_TEMPLATE = (
    r"{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>system\n" + SYSTEM + r"<|im_end|>\n' }}{%- endif %}"
    r"{%- for message in messages %}{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}"
    r"{%- endfor %}"
    r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
THINKING = {
    "start": "<|im_start|>think",
    "start_in_prompt": True,
    "end": "<|im_start|>",
    "close": "<|im_start|>answer",
    "end_string": "<|im_start|>answer\nFinal Answer:",
    "end_string_on_new_line": True,
    "ignore_strings": ["Wait"],
}


class Problem:
    """a x + b = c (mod m)"""

    def __init__(self, rng):
        self.m = rng.choice(MODULI)
        self.a = rng.randint(2, min(12, self.m - 1))
        self.b = rng.randint(0, self.m - 1)
        self.x = rng.randint(0, self.m - 1)
        self.c = (self.a * self.x + self.b) % self.m

    def question(self):
        return f"Find x with {self.a}x + {self.b} = {self.c} (mod {self.m})."

    def line(self, t):
        """One try. Every step of the arithmetic is spelled out, so that a small model can follow it."""
        total = self.a * t + self.b
        verdict = "yes" if t == self.x else "no"
        return (
            f"try {t}: {self.a}*{t}={self.a * t}, +{self.b}={total}, mod {self.m}={total % self.m}, "
            f"-{self.c}={total % self.m - self.c} {verdict}\n"
        )

    def thinking(self, rng):
        """Rounds of tries from a random start. After a round without a hit it gives up and guesses, or waits and goes on.
        After a hit it may wait and try the same x again. Returns text and answer."""
        start, text, tried, wait = rng.randrange(self.m), "", [], False
        for i in range(self.m):
            t = (start + i) % self.m
            text += ("Wait, " if wait else "") + self.line(t)
            tried.append(t)
            wait = False
            if t == self.x:
                while rng.random() < 0.2:
                    text += "Wait, " + self.line(t)
                return text, t
            if len(tried) % TRIES_PER_ROUND == 0:
                if rng.random() > 0.3:
                    return text, rng.choice([g for g in range(self.m) if g not in tried])
                wait = True
        raise AssertionError("some x solves it")


def example(rng):
    """(prompt, completion). Some completions do not think at all, and some are cut off, as a maximum would: both guess."""
    problem = Problem(rng)
    text, answer = problem.thinking(rng)
    if rng.random() < 0.15:
        text, answer = "", rng.randrange(problem.m)
    elif rng.random() < 0.15:
        text = text[: rng.randrange(len(text))]
        if f"try {problem.x}:" not in text or "yes" not in text:
            answer = rng.randrange(problem.m)
        if not text.endswith("\n"):
            text += "\n"
    prompt = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{problem.question()}<|im_end|>\n<|im_start|>assistant\n"
    )
    return prompt, f"<|im_start|>think\n{text}<|im_start|>answer\nFinal Answer: x = {answer}<|im_end|>\n"


def train_tokenizer(rng):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "Final Answer: answer think user system assistant Wait Alternatively Hmm"
    tokenizer.train_from_iterator(["".join(example(rng)) for _ in range(3000)] + [words] * 50, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def batches(rng, encode):
    """For ever: lists of (prompt length, ids), about BATCH_TOKENS tokens each, of similar lengths."""
    while True:
        pool = []
        for _ in range(16 * BATCH_TOKENS // 170):
            prompt, completion = (encode(text) for text in example(rng))
            pool.append((len(prompt), prompt + completion))
        pool.sort(key=lambda e: len(e[1]))
        made, current = [], []
        for e in pool:
            if current and (len(current) + 1) * len(e[1]) > BATCH_TOKENS:
                made.append(current)
                current = []
            current.append(e)
        rng.shuffle(made)
        yield from made


def loss_of(model, batch, verdicts):
    """Cross entropy of the completions, verdicts weighted."""
    length = max(len(ids) for _, ids in batch)
    inputs = torch.zeros(len(batch), length, dtype=torch.long)
    labels = torch.full((len(batch), length), -100)
    for row, (prompt, ids) in enumerate(batch):
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, prompt : len(ids)] = torch.tensor(ids[prompt:])
    logits = model(input_ids=inputs).logits[:, :-1].flatten(0, 1)
    wanted = labels[:, 1:].flatten()
    entropy = torch.nn.functional.cross_entropy(logits, wanted.clamp(min=0), reduction="none")
    weight = (wanted >= 0).float() * (1 + (VERDICT_WEIGHT - 1) * torch.isin(wanted, verdicts).float())
    return (entropy * weight).sum() / weight.sum()


def train(model, rng, encode, minutes):
    verdicts = torch.tensor([encode(" yes")[0], encode(" no")[0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    start = time.monotonic()
    for step, batch in enumerate(batches(rng, encode)):
        done = (time.monotonic() - start) / (minutes * 60)
        if done >= 1:
            return
        # 100 steps of warm-up, then a cosine down to 2 %.
        rate = LEARNING_RATE * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, batch, verdicts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}, {done:.0%} of the time, loss {loss.item():.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)

    tokenizer = train_tokenizer(rng)
    tokenizer.save_pretrained(args.out, save_jinja_files=False)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = Qwen2ForCausalLM(config)
    train(model, rng, lambda text: tokenizer.encode(text, add_special_tokens=False), args.minutes)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "thinking.json").write_text(json.dumps(THINKING, indent=2) + "\n")


if __name__ == "__main__":
    main()
