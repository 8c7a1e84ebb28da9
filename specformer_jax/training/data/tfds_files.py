"""Distilled answers as a TFDS dataset in array_record files: written and read without TensorFlow."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from specformer_jax.errors import UserError
from specformer_jax.training.data.documents import Document, check_ids, read_meta


class _Distilled(tfds.core.GeneratorBasedBuilder):
    """Prompts and the target's own answers as token ids."""

    VERSION = tfds.core.Version("1.1.0")  # 1.0.0 had one answer a document
    name = "distilled"
    code_path = None  # TFDS would import importlib_resources, which it does not require, to find this file

    def __init__(self, documents: Sequence[Document], meta: dict[str, str], **kwargs):
        self._documents, self._meta = documents, meta
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "tokens": tfds.features.Sequence(tfds.features.Scalar(np.int32)),
            "answers": tfds.features.Sequence(tfds.features.Scalar(np.int32)),  # begin, end, begin, end ...
            "temperature": tfds.features.Scalar(np.float32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(self._meta),  # written together with the rows, as documents.TFDS_META
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, document in enumerate(self._documents):
            yield (
                number,
                {
                    "id": document.id,
                    "tokens": document.tokens,
                    "answers": np.ravel(document.answers).astype(np.int32),
                    "temperature": document.temperature,
                },
            )


def build(documents: Sequence[Document], folder: str | os.PathLike, tokenizer: str | None = None) -> Path:
    """Writes documents as array_record files; a dataset of the same documents that is there already is taken.

    Args:
      documents: what is written.
      folder: the directory that the dataset is made in.
      tokenizer: fingerprint of the tokenizer that the documents were made with, for `sources.check_tokenizer`; None
        if unknown.

    Returns:
      The directory that `sources.read_documents` and `open_source` read.

    Raises:
      UserError: the folder holds a dataset of other documents, or cannot be written.
    """
    meta = {"documents": _digest(documents)}
    if tokenizer is not None:
        meta["tokenizer"] = tokenizer
    builder = _Distilled(documents, meta, data_dir=os.fspath(folder), file_format="array_record")
    path = Path(builder.data_dir)
    try:
        builder.download_and_prepare()
    except OSError as error:
        if not path.is_dir():  # else another host was quicker
            raise UserError(f"a dataset cannot be written to {folder}: {error}") from error
    # Datasets of an earlier version do not name their documents.
    if (read_meta(path).get("documents") or _digest(open_source(path))) != meta["documents"]:
        raise UserError(
            f"{folder} holds a dataset of other answers than the data: name a new directory to write these to, or leave"
            f" --tfds out and train on the dataset with --data {path}"
        )
    return path


def _digest(documents: Sequence[Document]) -> str:
    """A digest of what the documents say, the same for any order of them: TFDS stores them shuffled."""
    each = []
    for d in documents:
        facts = repr((d.id, np.ravel(d.answers).tolist(), float(np.float32(d.temperature)))).encode()
        each.append(hashlib.sha256(facts + np.asarray(d.tokens, "<i4").tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(each))).hexdigest()


class _Source(Sequence):
    """Random access to a TFDS data source as `Document`s, whose ids are checked when they are read."""

    def __init__(self, source, where: str, vocab_size: int | None):
        self._source, self._where, self._vocab_size = source, where, vocab_size

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._source[index]
        tokens, name = np.asarray(row["tokens"], np.int32), row["id"].decode()
        check_ids(f"{self._where}, document {name}", tokens.min(initial=0), tokens.max(initial=0), self._vocab_size)
        bounds = np.asarray(row["answers"]).tolist() if "answers" in row else [int(row["prompt"]), len(tokens)]
        return Document(name, tokens, tuple(zip(bounds[::2], bounds[1::2], strict=True)), float(row["temperature"]))


def open_source(folder: str | os.PathLike, vocab_size: int | None = None) -> Sequence[Document]:
    """The documents of a directory that `build` wrote; reading one with an id outside vocab_size is a UserError.

    Raises:
      UserError: the directory cannot be read as a dataset, or holds no rows.
    """
    try:
        source = tfds.builder_from_directory(os.fspath(folder)).as_data_source(split="train")
    except Exception as error:  # TFDS raises a different one for every kind of damage
        raise UserError(f"the dataset in {folder} cannot be read: {error}") from error
    if not len(source):
        raise UserError(f"the dataset in {folder} is empty")
    return _Source(source, f"the dataset in {folder}", vocab_size)
