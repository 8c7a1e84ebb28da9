"""Fixtures that several test files share."""

import json
import os
import shutil
from pathlib import Path

# Tests compare CPU numbers; where an accelerator's plug-in is installed it must not be taken.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

# Shapes in annotations are checked here and nowhere else: these modules are decorated when they are first imported.
CHECKED = (
    "pallas_kernels.attention",
    "pallas_kernels.masks",
    "pallas_kernels.noise",
    "pallas_kernels.norm",
    "pallas_kernels.product",
    "pallas_kernels.rotary",
    "pallas_kernels.sampling",
    "pallas_kernels.swiglu",
    "specformer_jax.nn",
    "specformer_jax.drafters",
    "specformer_jax.decoding",
    "specformer_jax.engine.compiled_steps",
    "specformer_jax.training.loss",
    "specformer_jax.training.placement",
    "specformer_jax.training.train_step",
)
install_import_hook(CHECKED, "beartype.beartype")

import flax.linen as nn
import jax
import numpy as np
import pytest
import tokenizers

from specformer_jax.config import DraftConfig
from specformer_jax.loading import fetch, head_checkpoint
from specformer_jax.loading.target_config import read_config

# The default run compiles in a quarter of the time, and less well. The slow tests run what users run.
QUICK = "--xla_backend_optimization_level=0"
if jax.__version_info__[:2] == (0, 10):  # later versions have no other emitters
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config):
    """Programs are kept in pytest's own cache folder: test files share them, and so does the next run."""
    if "not (slow" in config.option.markexpr:
        os.environ.setdefault("XLA_FLAGS", QUICK)
    if not config.pluginmanager.hasplugin("cacheprovider"):
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("programs")))
    jax.config.update("jax_compilation_cache_max_size", 2 * 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Forgets a file's compiled programs at its end: those of all together need more memory maps than Linux allows."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def builtin_path():
    """The built-in target's GGUF file, fetched once."""
    return fetch.builtin_gguf()


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory):
    """A tiny Hugging Face directory: the golden model's weights, a word-level tokenizer, a chat template."""
    folder = tmp_path_factory.mktemp("target")
    for file in (Path(__file__).parent / "golden" / "llama_gqa_tied").iterdir():
        if file.name != "golden.npz":
            shutil.copy(file, folder)
    size = read_config(folder).vocab_size
    vocabulary = {f"w{i}": i for i in range(size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture(scope="session")
def tiny_head(tiny_target, tmp_path_factory):
    """A head of random weights with 3 slots for that target."""
    config = read_config(tiny_target)
    draft = DraftConfig(max_draft_length=3).bind(config)
    rng = np.random.default_rng(0)
    shapes = nn.unbox(head_checkpoint.boxed_params(config, draft))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.2, shapes)
    folder = tmp_path_factory.mktemp("head")
    head_checkpoint.save_head(folder, draft, config, params)
    return folder
