"""The official client against the server, over loopback."""

import openai
import pytest

from specformer_jax.batch import generation
from specformer_jax.config import SamplingParams

SAMPLED = {"temperature": 0.8, "seed": 7, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(served):
    return served.engine.lm.name


def generated(served, prompt, *, raw, seed=7, temperature=0.8):
    """What `serve.py generate` answers."""
    sampling_params = SamplingParams(temperature=temperature, seed=seed, max_new_tokens=12)
    [answer] = generation.generate(served.engine.lm, [prompt], sampling_params=sampling_params, raw=raw, draft_length=0)
    return answer


def test_models(client, model):
    [card] = client.models.list().data
    assert card.id == model and card.max_model_len == 192 and card.max_draft_length == 3
    assert client.models.retrieve(model).id == model


def test_completions_are_those_of_generate(served, client, model):
    wanted = generated(served, "w5 w6 w7", raw=True)
    answer = client.completions.create(model=model, prompt="w5 w6 w7", **SAMPLED)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == model
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == (wanted.text, wanted.finish_reason) and choice.logprobs is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, wanted.completion_tokens)
    assert usage.total_tokens == 3 + wanted.completion_tokens and usage.prompt_tokens_details.cached_tokens >= 0
    assert usage.kappa == pytest.approx((usage.completion_tokens - 1) / usage.steps, abs=1e-4)
    assert usage.accepted_tokens == sum(usage.accepted_per_position) <= usage.drafted_tokens


def test_prompts_come_in_four_forms(client, model):
    ask = {"model": model, "temperature": 0, "max_tokens": 5}
    text, ids = "w5 w6", [5, 6]
    one = client.completions.create(prompt=text, **ask)
    assert client.completions.create(prompt=ids, **ask).choices == one.choices
    for both in ([text, "w9"], [ids, [9]]):
        answer = client.completions.create(prompt=both, **ask)
        assert [c.index for c in answer.choices] == [0, 1] and answer.choices[0].text == one.choices[0].text
        assert answer.choices[1].text == client.completions.create(prompt="w9", **ask).choices[0].text
        assert answer.usage.prompt_tokens == 3


def test_chat_is_that_of_generate(served, client, model):
    wanted = generated(served, "w5 w6", raw=False)
    messages = [{"role": "user", "content": "w5 w6"}]
    answer = client.chat.completions.create(model=model, messages=messages, **SAMPLED)
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == wanted.finish_reason
    # The client's own message object goes back as it came, and content may come in parts.
    parts = [{"type": "text", "text": "w5 "}, {"type": "text", "text": "w6"}]
    said = answer.choices[0].message.model_dump() | {"tool_calls": [], "annotations": []}
    again = [{"role": "user", "content": parts}, answer.choices[0].message, {"role": "user", "content": "w7"}]
    longer = client.chat.completions.create(model=model, messages=again, **SAMPLED)
    assert longer.usage.prompt_tokens == 4 + len(wanted.text.split()) + 2 + 3
    listed = client.chat.completions.create(model=model, messages=[again[0], said, again[2]], **SAMPLED)
    assert listed.choices[0].message.content == longer.choices[0].message.content


def test_streams_add_up_to_the_whole_answer(client, model):
    ask = {"model": model, "messages": [{"role": "user", "content": "w5 w6"}], **SAMPLED}
    whole = client.chat.completions.create(**ask)
    options = {"include_usage": True, "include_obfuscation": False}
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options=options))
    assert {c.object for c in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks[:-1]]
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) == {None}
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1])
    extra = [c for c in chunks[:-1] if c.choices[0].model_extra]
    assert not extra, "standard clients see standard chunks"


def test_a_completion_streams(client, model):
    ask = {"model": model, "prompt": ["w5 w6", "w8"], "n": 2, **SAMPLED}
    whole = client.completions.create(**ask)
    texts = [""] * 4
    for chunk in client.completions.create(**ask, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices] and len(set(texts)) == 4


def test_the_same_seed_gives_the_same_answer(served, client, model):
    def text(**more):
        return client.completions.create(model=model, prompt="w5", max_tokens=12, **more).choices[0].text

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text(seed=-1) == text(seed=2**32 - 1) and text(seed=2**40 + 3) == text(seed=3)
    # Without a seed or a temperature an answer is sampled at temperature 1, anew each time.
    assert len({text() for _ in range(5)}) > 1
    assert text(seed=3) == generated(served, "w5", raw=True, seed=3, temperature=1.0).text


def test_choices_are_those_of_the_seeds_that_follow(client, model):
    ask = {"model": model, "prompt": "w5 w6", "temperature": 0.8, "max_tokens": 8}
    three = client.completions.create(n=3, seed=20, **ask)
    alone = [client.completions.create(seed=20 + i, **ask).choices[0].text for i in range(3)]
    assert [choice.text for choice in three.choices] == alone
    assert three.usage.prompt_tokens == 2


@pytest.mark.parametrize("speculative", ["off", "auto", 0, 1, 3])
def test_speculation_does_not_change_an_answer(served, client, model, speculative):
    answer = client.completions.create(
        model=model, prompt="w5 w6 w7", **SAMPLED, extra_body={"speculative": speculative}
    )
    assert answer.choices[0].text == generated(served, "w5 w6 w7", raw=True).text
    if speculative in ("off", 0):
        assert answer.usage.kappa == 1 and answer.usage.drafted_tokens == 0
    if speculative == 1:
        assert not any(answer.usage.accepted_per_position[1:])


def test_an_answer_ends_before_a_stop_string(client, model):
    ask = {"model": model, "prompt": "w5 w6", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**ask).choices[0].text
    word = whole.split()[4]
    cut = whole[: whole.index(word)]
    for stop in (word, [word, "never"]):
        choice = client.completions.create(stop=stop, **ask).choices[0]
        assert (choice.text, choice.finish_reason) == (cut, "stop")
    streamed = client.completions.create(stop=word, stream=True, **ask)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut


def test_logprobs_of_completions(client, model):
    ask = {"model": model, "prompt": "w5 w6", "temperature": 0, "max_tokens": 6}
    choice = client.completions.create(logprobs=2, **ask).choices[0]
    scores = choice.logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == 6
    assert scores.tokens == choice.text.split()
    for token, logprob, top in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True):
        assert len(top) == 2 and top[token] == pytest.approx(logprob) == max(top.values()) <= 0
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        assert choice.text[offset:].split()[0] == token
    streamed = [c.choices[0].logprobs for c in client.completions.create(logprobs=2, stream=True, **ask)]
    assert [t for part in streamed if part for t in part.tokens] == scores.tokens
    assert [o for part in streamed if part for o in part.text_offset] == scores.text_offset


def test_a_prompt_is_echoed_with_its_scores(client, model):
    """What lm-eval asks for: the likelihood of a text, token by token; and a greedy answer after it, or none."""
    ask = dict(model=model, prompt="w5 w6 w7", temperature=0)
    plain = client.completions.create(max_tokens=5, logprobs=2, **ask).choices[0]
    whole = client.completions.create(max_tokens=5, logprobs=2, echo=True, **ask)
    choice, scores = whole.choices[0], whole.choices[0].logprobs
    assert choice.text == "w5 w6 w7" + plain.text
    assert client.completions.create(max_tokens=5, echo=True, **ask).choices[0].text == choice.text
    count = whole.usage.prompt_tokens
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == count + 5
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    assert scores.token_logprobs[count:] == pytest.approx(plain.logprobs.token_logprobs)
    assert all(logprob < 0 for logprob in scores.token_logprobs[1:])
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        assert choice.text[offset:].split()[0] == token
    none = client.completions.create(max_tokens=0, logprobs=2, echo=True, **ask)
    assert none.choices[0].text == "w5 w6 w7" and none.choices[0].finish_reason == "length"
    assert none.choices[0].logprobs.token_logprobs[1:] == pytest.approx(scores.token_logprobs[1:count])
    assert none.usage.completion_tokens == 0
    assert client.completions.create(max_tokens=0, echo=True, **ask).choices[0].text == "w5 w6 w7"
    streamed = list(client.completions.create(max_tokens=5, logprobs=2, echo=True, stream=True, **ask))
    assert "".join(c.choices[0].text for c in streamed if c.choices) == choice.text
    parts = [c.choices[0].logprobs for c in streamed if c.choices and c.choices[0].logprobs]
    assert [x for part in parts for x in part.text_offset] == scores.text_offset
    two = client.completions.create(model=model, prompt=["w5 w6", "w7"], n=2, max_tokens=2, echo=True, seed=1)
    assert [choice.text.startswith("w5 w6") for choice in two.choices] == [True, True, False, False]


def test_a_prompt_that_is_only_scored_generates_nothing(served, client, model):
    before = served.engine.stats()
    ask = dict(model=model, prompt=["w5 w6 w7", "w8"], max_tokens=0, logprobs=1, echo=True)
    client.completions.create(**ask)
    after = served.engine.stats()
    assert (after.completion_tokens, after.prompt_tokens) == (before.completion_tokens, before.prompt_tokens + 4)


def test_logprobs_of_chat(client, model):
    ask = {"model": model, "messages": [{"role": "user", "content": "w5"}], "temperature": 0, "max_tokens": 4}
    content = client.chat.completions.create(logprobs=True, top_logprobs=3, **ask).choices[0].logprobs.content
    assert len(content) == 4
    for token in content:
        assert len(token.top_logprobs) == 3 and bytes(token.bytes).decode() == token.token
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
    assert client.chat.completions.create(logprobs=True, **ask).choices[0].logprobs.content[0].top_logprobs == []


def test_tokens_are_shown_where_asked_for(client, model):
    ask = {"model": model, "messages": [{"role": "user", "content": "w5"}], **SAMPLED}
    answer = client.chat.completions.create(**ask, extra_body={"return_tokens": True, "speculative": 3})
    shown = answer.choices[0].specformer
    assert "".join(token["text"] for token in shown["tokens"]) == answer.choices[0].message.content
    assert sum(token["drafted"] for token in shown["tokens"]) == answer.usage.accepted_tokens
    assert shown["kappa"] == answer.usage.kappa


def test_chat_may_fill_the_context(client, model):
    messages = [{"role": "user", "content": "w5 " * 150}]
    answer = client.chat.completions.create(model=model, messages=messages, seed=1)
    choice, usage = answer.choices[0], answer.usage
    assert choice.finish_reason == "stop" or usage.total_tokens == 192
    short = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=3, seed=1)
    assert short.usage.completion_tokens <= 3


def test_errors_have_the_right_class(served, client, model, monkeypatch):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.completions.create(model="gpt", prompt="w5")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 192 tokens") as caught:
        client.completions.create(model=model, prompt="w5 " * 192)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="suffix would change the answer"):
        client.completions.create(model=model, prompt="w5", suffix="w6")
    client.completions.create(
        model=model, prompt="w5", frequency_penalty=0.5, logit_bias={"7": -5}, user="me", max_tokens=1
    )
