"""Distilled answers as a TFDS dataset in array_record files: written and read without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from specformer_jax.config import UserError
from specformer_jax.data import Document


class _Distilled(tfds.core.GeneratorBasedBuilder):
    """Prompts and the target's own answers as token ids."""

    VERSION = tfds.core.Version("1.0.0")
    name = "distilled"
    code_path = None  # TFDS would import importlib_resources, which it does not require, to find this file

    def __init__(self, documents: Sequence[Document], **kwargs):
        self._documents = documents
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "tokens": tfds.features.Sequence(tfds.features.Scalar(np.int32)),
            "prompt": tfds.features.Scalar(np.int32),
            "temperature": tfds.features.Scalar(np.float32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, document in enumerate(self._documents):
            yield (
                number,
                {
                    "id": document.id,
                    "tokens": document.tokens,
                    "prompt": document.prompt,
                    "temperature": document.temperature,
                },
            )


def build(documents: Sequence[Document], folder: str | os.PathLike) -> Path:
    """Writes documents as array_record files.

    Returns:
      The directory that `data.read_documents` and `open_source` read.
    """
    builder = _Distilled(documents, data_dir=os.fspath(folder), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


class _Source(Sequence):
    """Random access to a TFDS data source as `Document`s."""

    def __init__(self, source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._source[index]
        tokens = np.asarray(row["tokens"], np.int32)
        return Document(row["id"].decode(), tokens, int(row["prompt"]), float(row["temperature"]))


def open_source(folder: str | os.PathLike) -> Sequence[Document]:
    """The documents of a directory that `build` wrote.

    Raises:
      UserError: the directory cannot be read as a dataset, or holds no rows.
    """
    try:
        source = tfds.builder_from_directory(os.fspath(folder)).as_data_source(split="train")
    except Exception as error:  # TFDS raises a different one for every kind of damage
        raise UserError(f"the dataset in {folder} cannot be read: {error}") from error
    if not len(source):
        raise UserError(f"the dataset in {folder} is empty")
    return _Source(source)
