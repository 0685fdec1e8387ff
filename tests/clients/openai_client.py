"""Talks to a node through OpenAI's client for Python, as its users do. Argument: the node's address."""

import sys
from concurrent.futures import ThreadPoolExecutor

import openai
from openai import OpenAI

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


def raises(kind, status, code, call):
    try:
        call()
    except kind as error:
        assert type(error) is kind, type(error)
        assert (error.status_code, error.code) == (status, code), (error.status_code, error.code)
        return error
    raise AssertionError(f"{kind.__name__} was expected")


def main(url):
    client = OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60)
    models = [model.id for model in client.models.list()]
    assert models == ["echo", "tiny-chat"], models
    assert client.models.retrieve("tiny-chat").id == "tiny-chat"

    def ask(messages=CAPITAL, model="tiny-chat", **further):
        return client.chat.completions.create(model=model, messages=messages, **{"temperature": 0, **further})

    whole = ask()
    text = whole.choices[0].message.content
    assert "Paris" in text and whole.choices[0].finish_reason == "stop", whole
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage, chunks[-1]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in ask(stream=True))

    with client.chat.completions.stream(model="tiny-chat", messages=CAPITAL, temperature=0) as stream:
        assert stream.get_final_completion().choices[0].message.content == text

    stopped = ask(stop=["Paris"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.index("Paris")], "stop"), stopped
    cut = ask(max_tokens=2)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2), cut
    cut = ask(max_completion_tokens=2)
    assert cut.usage.completion_tokens == 2, cut

    story = [{"role": "user", "content": "Tell me a story about Mia."}]
    seeded = [ask(story, temperature=1.5, seed=seed).choices[0].message.content for seed in (7, 7, 8, 9)]
    assert seeded[0] == seeded[1] and len(set(seeded)) > 1, seeded

    token = ask(logprobs=True, top_logprobs=2, max_tokens=1).choices[0].logprobs.content[0]
    assert token.logprob <= 0 and len(token.top_logprobs) == 2, token

    plain = client.completions.create(model="echo", prompt="one two", temperature=0)
    assert plain.choices[0].text == "one two", plain

    vectors = client.embeddings.create(model="tiny-chat", input=["a plugin", "Paris"])
    assert [vector.index for vector in vectors.data] == [0, 1]
    # The client asks for base64 unless told otherwise, and decodes it.
    floats = client.embeddings.create(model="tiny-chat", input="a plugin", encoding_format="float").data[0].embedding
    assert max(abs(a - b) for a, b in zip(vectors.data[0].embedding, floats, strict=True)) < 1e-6
    assert abs(sum(x * x for x in floats) - 1) < 1e-3

    raises(openai.NotFoundError, 404, "model_not_found", lambda: ask(model="gpt-9"))
    raises(openai.NotFoundError, 404, "model_not_found", lambda: client.models.retrieve("gpt-9"))
    error = raises(openai.BadRequestError, 400, "invalid_value", lambda: ask(temperature=9))
    assert error.param == "temperature", error.param
    raises(openai.BadRequestError, 400, "unknown_parameter", lambda: ask(extra_body={"temperatur": 1}))
    long = [{"role": "user", "content": "word " * 100}]
    raises(openai.BadRequestError, 400, "context_length_exceeded", lambda: ask(long, "echo"))
    raises(openai.BadRequestError, 400, "context_length_exceeded", lambda: ask(long, "echo", stream=True))

    # One slot and one place in the queue: of eight at once some are sent away.
    words = [{"role": "user", "content": "word " * 30}]

    def crowd(client):
        def one(number):
            try:
                return client.chat.completions.create(model="echo", messages=[{"role": "user", "content": f"{number} " * 30}])
            except openai.RateLimitError as error:
                return error

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, range(8)))

    refused = [answer for answer in crowd(client) if isinstance(answer, openai.RateLimitError)]
    assert refused, "eight requests at one slot were all let in"
    for error in refused:
        assert (error.status_code, error.code) == (429, "queue_full"), error
        assert int(error.response.headers["retry-after"]) >= 1
    # The client's own retries wait for as long as they are told, and are let in.
    assert not [answer for answer in crowd(client.with_options(max_retries=8)) if isinstance(answer, openai.RateLimitError)]
    assert ask(words, "echo").choices[0].message.content == "word " * 30
    print(f"openai {openai.__version__} for Python: good")


main(sys.argv[1])
