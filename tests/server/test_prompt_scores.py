"""Log-probabilities of prompts, asked for as lm-eval's local-completions asks for them: transformers', in float32."""

import numpy as np
import pytest

from tests.server.test_client_fields import COMPLETIONS, ask

ITEMS, TOGETHER = 200, 8


def likelihoods(served, prompts, contexts):
    """(log-likelihood, whether it is what a greedy answer says) of what follows each context, as lm-eval reads it."""
    answer = ask(served, COMPLETIONS, prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1234)[1]
    for choice, context in zip(answer["choices"], contexts, strict=True):
        scores = choice["logprobs"]
        chosen, top = scores["token_logprobs"][context:-1], scores["top_logprobs"][context:-1]
        yield (
            sum(chosen),
            all(
                token == max(listed, key=listed.get)
                for token, listed in zip(scores["tokens"][context:-1], top, strict=True)
            ),
        )


@pytest.fixture(scope="module")
def theirs(tiny_target):
    """The log-probabilities of all tokens after each token of a prompt, by transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)

    def scores(prompt):
        with torch.no_grad():
            return model(torch.tensor([prompt])).logits[0].log_softmax(-1).numpy()

    return scores


@pytest.mark.parity
@pytest.mark.parametrize("is_cached", [False, True], ids=["read-for-the-first-time", "cached"])
def test_likelihoods_are_those_of_transformers(served, theirs, is_cached):
    """200 items: texts of many lengths, a fourth of them what the model itself would say, that begin alike."""
    rng = np.random.default_rng(is_cached)
    vocab_size = served.engine.lm.config.vocab_size
    shared = rng.integers(4, vocab_size, 70).tolist()  # some pages that every other item begins with
    greedy = 0
    for begin in range(0, ITEMS, TOGETHER):
        prompts, contexts = [], []
        for i in range(begin, begin + TOGETHER):
            prompt = shared * (i % 2) + rng.integers(4, vocab_size, rng.integers(2, 90)).tolist()
            contexts.append(len(prompt) - 1)
            if i % 4 == 0:
                prompt[-1] = int(theirs(prompt[:-1])[-1].argmax())
            prompts.append(prompt)
        if is_cached:
            ask(served, COMPLETIONS, prompt=prompts)
            found = ask(served, COMPLETIONS, prompt=prompts)[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert found >= 64, "some of their pages are there"
        for prompt, context, (ours, is_greedy) in zip(
            prompts, contexts, likelihoods(served, prompts, contexts), strict=True
        ):
            wanted = theirs(prompt)[context - 1 : -1]
            assert ours == pytest.approx(wanted[np.arange(len(wanted)), prompt[context:]].sum(), abs=1e-3)
            top = np.sort(wanted[0])[-2:]
            if top[1] - top[0] > 1e-3:
                assert is_greedy == (wanted[0].argmax() == prompt[context])
                greedy += is_greedy
    assert greedy >= ITEMS // 4 - 2


@pytest.mark.parity
@pytest.mark.parametrize("most", [0, 1])
def test_whole_prompts_are_echoed(served, theirs, most):
    """As long as the context allows, alone and with others."""
    longest = served.engine.max_context - 1
    rng = np.random.default_rng(most)
    prompts = [rng.integers(4, served.engine.lm.config.vocab_size, longest - 30 * i).tolist() for i in range(4)]
    choices = ask(served, COMPLETIONS, prompt=prompts, max_tokens=most, logprobs=2, echo=True)[1]["choices"]
    for prompt, choice in zip(prompts, choices, strict=True):
        scores, wanted = choice["logprobs"], theirs(prompt)
        assert choice["text"].split()[: len(prompt)] == [f"w{id}" for id in prompt]
        assert len(scores["tokens"]) == len(prompt) + most and scores["token_logprobs"][0] is None
        chosen = wanted[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(scores["token_logprobs"][1 : len(prompt)], chosen, atol=1e-4)
        for listed, row in zip(scores["top_logprobs"][1 : len(prompt)], wanted, strict=False):
            np.testing.assert_allclose(sorted(listed.values())[-2:], np.sort(row)[-2:], atol=1e-4)
