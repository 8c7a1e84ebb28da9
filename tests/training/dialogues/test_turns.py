"""Every assistant turn is trained on, in its own context, and nothing else is; packed neighbours change no gradient."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specformer_jax.batch.conversations import Conversation
from specformer_jax.batch.generation import messages
from specformer_jax.errors import UserError
from specformer_jax.training.data.batches import Batches
from specformer_jax.training.data.documents import META, Document
from specformer_jax.training.data.sources import read_documents
from specformer_jax.training.distillation import kept_answers
from specformer_jax.training.train_step import Trainer

from .. import tiny
from . import templates

DIALOGUES = [
    Conversation("one", ("Why is the sky blue?",), None, ("Since air scatters blue light most.",)),
    Conversation("many", ("a", "b\n\nc", "é?"), None, ("first", "1. x\n2. ünï 日本\n", "[/INST] or so")),
    Conversation("lines", ("u\n", " v "), None, ("\n\nindented\n\n  code", "  spaced  ")),
]
SYSTEM = Conversation("system", ("hello", "again"), "Be brief.", ("hi", "hi again"))


def said(c: Conversation) -> list[dict[str, str]]:
    return messages([text for pair in zip(c.turns, c.answers, strict=True) for text in pair], c.system)


def kept(form: str, dialogues: list[Conversation], folder) -> list[Document]:
    kept_answers.keep(form, templates.tokenizer(form), dialogues, 2, folder)
    return list(read_documents(folder))


def mask_of(document: Document) -> np.ndarray:
    mask = np.zeros(len(document.tokens), bool)
    for begin, end in document.answers:
        mask[begin:end] = True
    return mask


@pytest.mark.parametrize("form", templates.FORMS)
def test_the_mask_over_every_answer_is_what_the_template_marks(form, tmp_path):
    dialogues = DIALOGUES if form in ("Mistral", "Gemma") else [*DIALOGUES, SYSTEM]  # these two have no system prompt
    documents = kept(form, dialogues, tmp_path)
    assert [document.id for document in documents] == [c.id for c in dialogues]  # the turns of each are one document
    for document, c in zip(documents, dialogues, strict=True):
        ids, marked = templates.own_mask(form, said(c))
        last = document.answers[-1][1]
        assert document.tokens.tolist() == ids[:last] and not marked[last:].any()
        np.testing.assert_array_equal(mask_of(document), marked[:last])
        assert len(document.answers) == len(c.turns)


@pytest.mark.parametrize("form", templates.FORMS)
def test_the_loss_is_over_these_tokens_and_no_others(form, tmp_path):
    """Each but an answer's first, which the target gives itself, is forecast by slot 0 once; no slot crosses an end."""
    documents = kept(form, DIALOGUES, tmp_path)
    size = max(len(document.tokens) for document in documents)
    source = Batches(documents, slots=4, sequence_length=size, rows=1)
    source[0]
    for number in range(source._starts[1]):
        batch = source[number]
        tokens, mask = batch["tokens"][0], _packed(documents, batch)
        ends = np.array([int(np.argmin([*mask[i:], False])) + i for i in range(size)])  # of the answer a token is in
        forecast = np.zeros(size, int)
        for anchor, labels in zip(batch["anchors"][0], batch["labels"][0], strict=True):
            if labels[0] >= 0:
                ahead = np.arange(anchor + 2, min(anchor + 6, ends[anchor + 1]))
                assert labels.tolist() == [*tokens[ahead], *[-1] * (4 - len(ahead))]
                forecast[anchor + 2] += 1
        np.testing.assert_array_equal(forecast, mask & np.roll(mask, 1) & (np.arange(size) > 0))


def _packed(documents: list[Document], batch) -> np.ndarray:
    """The masks of the documents of a packed row, one after the other."""
    mask = np.zeros(batch["tokens"].shape[1], bool)
    at = 0
    for segment in range(1, batch["segments"].max() + 1):
        tokens = batch["tokens"][0][batch["segments"][0] == segment]
        (document,) = [d for d in documents if np.array_equal(d.tokens, tokens)]
        mask[at : at + len(tokens)] = mask_of(document)
        at += len(tokens)
    return mask


def test_turns_that_are_written_otherwise_later_are_documents_of_their_own(tmp_path):
    """A template may leave an earlier answer's thinking out; an answer's text may have other tokens than the answer."""
    rows = [
        {"id": "a", "turn": 0, "prompt_ids": [1, 2], "response_ids": [3, 4]},
        {"id": "a", "turn": 1, "prompt_ids": [1, 2, 3, 4, 5], "response_ids": [6]},
        {"id": "b", "turn": 0, "prompt_ids": [1, 2], "response_ids": [3, 4]},
        {"id": "a", "turn": 2, "prompt_ids": [1, 2, 4, 5, 6, 7], "response_ids": [8, 9]},
        {"id": "b", "turn": 2, "prompt_ids": [1, 2, 3, 4, 7], "response_ids": [8, 9]},
        {"id": "c", "prompt_ids": [1], "response_ids": [2]},
        {"id": "c", "prompt_ids": [1, 2, 3], "response_ids": [4]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [(d.id, d.tokens.tolist(), d.answers) for d in read_documents(tmp_path)]
    assert found == [
        ("a", [1, 2, 3, 4, 5, 6], ((2, 4), (5, 6))),
        ("b", [1, 2, 3, 4], ((2, 4),)),
        ("a", [1, 2, 4, 5, 6, 7, 8, 9], ((6, 8),)),
        ("b", [1, 2, 3, 4, 7, 8, 9], ((5, 7),)),
        ("c", [1, 2], ((1, 2),)),
        ("c", [1, 2, 3, 4], ((3, 4),)),
    ]


def test_answers_that_cannot_be_kept_are_counted(tmp_path):
    dialogues = [
        Conversation("system", ("a",), "s", ("b",)),
        Conversation("open", ("a", "b", "c"), None, ("x", None, "z")),
        Conversation("none", ("a",)),
    ]
    tokenizer = templates.tokenizer("Gemma")
    written, left_out = kept_answers.keep("gemma", tokenizer, dialogues, 10, tmp_path / "a")
    assert written == 2  # x and the end of the turn
    assert [(omission.where, omission.part, omission.count) for omission in left_out] == [
        ("system", "row", 1),
        ("open", "turn", 2),
        ("none", "row", 1),
    ]
    assert "no system role" in left_out[0].reason and left_out[1].reason == "no answer stands there"
    with pytest.raises(UserError, match="there is no answer to keep: no answer stands there"):
        kept_answers.keep("gemma", tokenizer, dialogues[2:], 10, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(UserError, match="made with target gemma, not other"):
        kept_answers.keep("other", tokenizer, dialogues, 10, tmp_path / "a")
    kept_answers.keep("gemma", tokenizer, dialogues, 2, tmp_path / "c")
    with pytest.raises(UserError, match="shard-00001.jsonl answers prompts that are none of this run's"):
        kept_answers.keep("gemma", tokenizer, dialogues[1:], 2, tmp_path / "c")
    assert json.loads((tmp_path / "a" / META).read_text())["answers"] == "keep"


def test_plain_text_is_kept_without_a_template(tmp_path):
    tokenizer = templates.tokenizer("Llama-2")
    kept_answers.keep("x", tokenizer, [Conversation("a", ("a b", " c"), None, (" c", " d"))], 9, tmp_path, raw=True)
    [document] = read_documents(tmp_path)
    assert tokenizer.decode(document.tokens.tolist()) == "a b c c d"
    assert [tokenizer.decode(document.tokens[begin:end].tolist()) for begin, end in document.answers] == [" c", " d"]


@pytest.mark.slow
def test_the_gradient_of_a_packed_dialogue_does_not_depend_on_its_neighbours():
    """Bit for bit: others' tokens before and behind it, more or fewer of them, and even of other documents' number."""
    rng = np.random.default_rng(3)
    config = tiny.config(batch_rows=1, soft=0.5)
    trainer = Trainer(tiny.TARGET, config)
    dialogue = Document("d", rng.integers(3, 96, 24).astype(np.int32), ((4, 11), (15, 24)), 0.0)
    [alone] = [Batches([dialogue], slots=3, sequence_length=64, rows=1, anchors=48)[0]]
    at = 20  # where the dialogue stands in every row

    def row(before: list[int], behind: list[int]) -> dict[str, np.ndarray]:
        """The dialogue between documents of these lengths; only its own labels are left."""
        batch = {name: np.zeros_like(x) for name, x in alone.items()}
        place = 0
        for segment, size in enumerate([*before, 24, *behind], 1):
            batch["segments"][0, place : place + size] = segment
            batch["tokens"][0, place : place + size] = rng.integers(3, 96, size)
            place += size
        batch["tokens"][0, at : at + 24] = dialogue.tokens
        batch["labels"] = alone["labels"].copy()
        batch["anchors"] = np.where(alone["labels"][..., 0] >= 0, alone["anchors"] + at, 0)
        return batch

    frozen = trainer.freeze(tiny.target_params(), np.arange(64) + 2)
    params = trainer.init(jax.random.key(0)).params
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    gradient = jax.jit(jax.grad(lambda params, batch: trainer.losses(params, frozen, batch, jnp.float32(1))[0]))
    gradients = [gradient(params, row(*sizes)) for sizes in (([20], [20]), ([20], [20]), ([7, 13], [5, 8]))]
    for one, other in itertools.pairwise(gradients):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[0])) > 0
    # Were the row one document, all this would show.
    mixed = [gradient(params, row([20], [20]) | {"segments": np.ones((1, 64), np.int32)}) for _ in range(2)]
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, mixed), strict=True))
