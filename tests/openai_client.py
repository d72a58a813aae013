"""Asks a server that serves models/modulo what programs ask through OpenAI's own client: openai_client.py URL KEY

Exits 1 with what was not as the client's users expect it.
"""

import sys

import openai

QUESTION = [{"role": "user", "content": "Find x with 3x + 4 = 2 (mod 11)."}]


def main(url, key):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    [model] = client.models.list().data

    whole = client.chat.completions.create(
        model=model.id, messages=QUESTION, temperature=0, extra_body={"thinking_n_ignore": 1, "thinking_n_ignore_str": "Wait"})
    message = whole.choices[0].message
    assert "x = 3" in message.content, message
    assert "Wait" in message.reasoning_content and message.reasoning == message.reasoning_content, message
    assert whole.choices[0].finish_reason == "stop"
    assert 0 < whole.usage.completion_tokens_details.reasoning_tokens < whole.usage.completion_tokens
    assert whole.choices[0].thinking["ignores_used"] == 1 and not whole.choices[0].thinking["max_hit"]

    chunks = list(client.chat.completions.create(
        model=model.id, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True},
        extra_body={"thinking_token_budget": 12}))
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == 12, chunks[-1]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.reasoning_content, "the first chunk says something"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1])

    several = client.chat.completions.create(
        model=model.id, messages=QUESTION, n=3, seed=1, temperature=1.0, max_completion_tokens=8, logprobs=True, top_logprobs=2)
    assert [c.index for c in several.choices] == [0, 1, 2]
    entries = several.choices[0].logprobs.content
    assert len(entries) == 8 and all(len(e.top_logprobs) == 2 and e.logprob <= 0 for e in entries)

    completion = client.completions.create(model=model.id, prompt="Find x", max_tokens=4, temperature=0)
    assert completion.usage.completion_tokens == 4 and completion.choices[0].text

    for expected, ask in (
        (openai.NotFoundError, lambda: client.chat.completions.create(model="another", messages=QUESTION)),
        (openai.BadRequestError, lambda: client.chat.completions.create(model=model.id, messages=[])),
        (openai.BadRequestError, lambda: client.chat.completions.create(model=model.id, messages=QUESTION, temperature=-1)),
        (openai.AuthenticationError, lambda: openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()),
    ):
        try:
            ask()
        except expected as error:
            assert error.body["message"], error
        else:
            raise AssertionError(f"no {expected.__name__}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
