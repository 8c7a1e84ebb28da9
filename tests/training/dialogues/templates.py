"""Five public ways to write dialogues down, with small vocabularies of their kinds, and the mask each marks itself.

What an assistant wrote stands between {% generation %} marks, as templates for training have them: the rendering itself
then says which of its letters are to be learned.
"""

from __future__ import annotations

import functools

import jinja2
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from specformer_jax.config import TargetConfig
from specformer_jax.loading.chat_template import ChatTemplate
from specformer_jax.loading.tokenizer import Tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{{ '' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}<end_of_turn>{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }}<end_of_turn>{% endif %}\n{{ '' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{{ '' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set said = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set said = messages %}{% set system = '' %}{% endif %}"
    "{% for m in said %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)

# Name -> the template, its special tokens with the one that ends an answer last, and how its vocabulary is made.
FORMS = {
    "Llama-3": (LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "bytes"),
    "ChatML": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "bytes"),
    "Mistral": (MISTRAL, ["<s>", "[INST]", "[/INST]", "</s>"], "pieces"),
    "Gemma": (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"], "pieces"),
    "Llama-2": (LLAMA2, ["<s>", "</s>"], "pieces"),
}
CORPUS = [
    "user assistant model system\n\n The sky is blue, since air scatters blue light most. [INST] [/INST] ",
    "a b\n",
] * 4


@functools.cache
def backend(form: str) -> tokenizers.Tokenizer:
    """A vocabulary of the form's kind, byte-level BPE or pieces with ▁ for a space and single bytes, from few lines."""
    _, special, kind = FORMS[form]
    made = tokenizers.Tokenizer(models.BPE(unk_token=None, byte_fallback=kind == "pieces"))
    alphabet = []
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "pieces" else []
    trainer = trainers.BpeTrainer(
        vocab_size=len(fallback) + 400, special_tokens=[*fallback, *special], initial_alphabet=alphabet
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def tokenizer(form: str) -> Tokenizer:
    """The form's tokenizer, as a target's folder would give it."""
    source, special, _ = FORMS[form]
    vocabulary = backend(form)
    end = vocabulary.token_to_id(special[-1])
    config = TargetConfig("llama", vocabulary.get_vocab_size(), 8, 1, 1, 1, 8, 8, 512, eos_ids=(end,))
    return Tokenizer(vocabulary, config, ChatTemplate(source, _names(form)))


def own_mask(form: str, messages: list[dict[str, str]]) -> tuple[list[int], np.ndarray]:
    """The token ids of a whole dialogue, and which of them its template marks as an assistant's."""
    source = FORMS[form][0].replace("{% generation %}", "\x02").replace("{% endgeneration %}", "\x03")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(source).render(messages=messages, add_generation_prompt=False, **_names(form))
    text, marked, inside = "", [], False
    for letter in rendered:
        if letter in "\x02\x03":
            inside = letter == "\x02"
        else:
            text += letter
            marked.append(inside)
    encoded = backend(form).encode(text, add_special_tokens=False)
    return encoded.ids, np.array([any(marked[begin:end]) for begin, end in encoded.offsets])


def _names(form: str) -> dict[str, str]:
    special = FORMS[form][1]
    return {"bos_token": special[0], "eos_token": special[-1]}
