"""An engine that says what a test wants, without a model: for all that is about words on the wire."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import tokenizers

from specformer_jax.config import TargetConfig
from specformer_jax.engine.config import EngineConfig
from specformer_jax.engine.request import Delta, Request, TokenOutput, Usage, check_request
from specformer_jax.engine.stops import FinalText
from specformer_jax.loading.chat_template import ChatTemplate
from specformer_jax.loading.tokenizer import Tokenizer

SPECIAL = ("<eos>", "[TOOL_CALLS]", "<|python_tag|>")
LETTERS = [chr(i) for i in range(32, 127)] + ["\n", "é", "“", "日"]
CONTEXT = 4000

# As Qwen3's: tools are listed, thoughts are left out of what was said before, an empty thought turns thinking off.
TEMPLATE = """\
{%- if tools %}{{ 'tools:' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '\\n' }}{% endif %}
{%- for m in messages %}
{{- m.role + ': ' + m.content.split('</think>')[-1] }}
{%- for call in m.tool_calls %}
{{- '<tool_call>' + call.function.name + ' ' }}{{ call.function.arguments | tojson }}{{ '</tool_call>' }}
{%- endfor %}{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'assistant: ' }}{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""


def tokenizer(template: str = TEMPLATE, marks: tuple[str, ...] = ()) -> Tokenizer:
    """Every letter is a token, and so are a few special ones."""
    words = {word: i for i, word in enumerate(("?", *LETTERS))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens([*SPECIAL, *marks])
    config = TargetConfig("llama", backend.get_vocab_size(), 8, 1, 1, 1, 8, 8, CONTEXT, eos_ids=(len(words),))
    return Tokenizer(backend, config, ChatTemplate(template, {}))


class ScriptedHandle:
    """A submitted request whose deltas are known."""

    def __init__(self, deltas: list[Delta]):
        self._deltas = deltas

    def subscribe(self, callback) -> None:
        for delta in self._deltas:
            callback(delta)

    def cancel(self) -> None:
        """It has ended."""


class ScriptedEngine:
    """Answers every request with `text`, a few tokens a delta.

    Attributes:
      text: what is said next; special tokens as they are written.
      requests: what was asked.
      per_delta: tokens of a delta.
    """

    def __init__(self, template: str = TEMPLATE, marks: tuple[str, ...] = ()):
        chosen = tokenizer(template, marks)
        size = SimpleNamespace(vocab_size=chosen.vocab_size, eos_ids=chosen.eos_ids, context=CONTEXT)
        model = SimpleNamespace(max_draft_length=3, truncation=True)
        self.lm = SimpleNamespace(name="scripted", tokenizer=chosen, config=size, model=model)
        self.config, self.max_context = EngineConfig(rows=4, max_context=CONTEXT, max_queue=64), CONTEXT
        self.text, self.per_delta = "", 3
        self.requests: list[Request] = []

    def submit(self, request: Request) -> ScriptedHandle:
        check_request(request, self.lm, self.max_context)
        self.requests.append(request)
        tokens, reason = self._tokens(request)
        usage, deltas = Usage(len(request.prompt_ids), accepted_per_position=(0, 0, 0)), []
        for begin in range(0, len(tokens), self.per_delta):
            part = tuple(tokens[begin : begin + self.per_delta])
            usage = dataclasses.replace(
                usage,
                completion_tokens=begin + len(part),
                steps=usage.steps + 1,
                drafted_tokens=usage.drafted_tokens + 3,
                accepted_per_position=tuple(n + (len(part) > 1 + i) for i, n in enumerate(usage.accepted_per_position)),
            )
            deltas.append(Delta(part, usage, reason if begin + len(part) == len(tokens) else None))
        return ScriptedHandle(deltas)

    def _tokens(self, request: Request) -> tuple[list[TokenOutput], str]:
        """The tokens of an answer and why it ends, as `ActiveRequest.take` has them."""
        tokenizer, logprob = self.lm.tokenizer, None if request.logprobs is None else -0.5
        ids = [*tokenizer.encode(self.text), *tokenizer.eos_ids][: request.sampling_params.max_new_tokens]
        final, tokens = FinalText(tokenizer.stream((), request.shown_ids), request.stop), []
        for i, id in enumerate(ids):
            ends = id in tokenizer.eos_ids
            tokens.append(TokenOutput(id, "" if ends else final.push(id), i % self.per_delta > 0, logprob))
            if final.stopped:
                break
        tokens[-1] = dataclasses.replace(tokens[-1], text=tokens[-1].text + final.finish())
        return tokens, "stop" if ends or final.stopped else "length"

    def learn(self, grammar: str) -> None:
        """Whoever asks for one is a test that looks at `requests`."""

    def stats(self):
        return SimpleNamespace(healthy=True)
