"""The peers of a CPU: how llama.cpp's passes are filled, by a stand-in for its library, and what the report says."""

import ctypes
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cpu_peers import __main__ as cpu_peers
from benchmarks.cpu_peers import llama_cpp, report
from specformer_jax.errors import UserError

V, END, MOST = 50, 49, 16


class Library(types.ModuleType):
    """As much of llama_cpp as the contestant calls; every token is followed by the next number."""

    def __init__(self):
        super().__init__("llama_cpp")
        self.passes, self._cache = [], {}
        self.llama_log_callback = lambda function: function
        for name in ("llama_backend_init", "llama_log_set", "llama_get_memory", "llama_model_get_vocab"):
            setattr(self, name, lambda *_: None)
        self.llama_model_default_params = types.SimpleNamespace
        self.llama_context_default_params = lambda: types.SimpleNamespace(n_batch=MOST)
        self.llama_model_load_from_file = self.llama_init_from_model = lambda *_: None
        self.llama_vocab_n_tokens = lambda _: V

    def llama_batch_init(self, tokens, _, sequences):
        zeros = lambda: [0] * tokens
        seq_id = [[0] * sequences for _ in range(tokens)]
        return types.SimpleNamespace(
            n_tokens=0, token=zeros(), pos=zeros(), logits=zeros(), n_seq_id=zeros(), seq_id=seq_id
        )

    def llama_decode(self, _, batch):
        read = [(batch.seq_id[i][0], batch.pos[i], batch.token[i]) for i in range(batch.n_tokens)]
        for sequence, position, token in read:
            held = self._cache.setdefault(sequence, [])
            assert position == len(held), "positions follow one another, from 0 on"
            held.append(token)
        self.passes.append(len({sequence for sequence, _, _ in read}))
        self._read, self._asks = read, batch.logits[: batch.n_tokens]
        return 0

    def llama_get_logits_ith(self, _, at):
        assert self._asks[at]
        logits = np.zeros(V, np.float32)
        logits[self._read[at][2] + 1] = 1
        return logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def llama_memory_seq_rm(self, _, sequence, *__):
        del self._cache[sequence]


@pytest.fixture
def library(monkeypatch):
    library = Library()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    return library


@pytest.mark.parametrize("concurrency", [1, 2, 3])
def test_each_request_is_answered_beside_the_others(library, concurrency):
    peer = llama_cpp.LlamaCpp(Path("model.gguf"), sequences=3, context=64)
    prompts = [[1, 2], [40] * 10, [46], [5] * 16, [7]]
    found = peer.serve(prompts, concurrency, eos_ids=(END,), max_new_tokens=5)
    assert found.answers == [[3, 4, 5, 6, 7], [41, 42, 43, 44, 45], [47, 48, 49], [6, 7, 8, 9, 10], [8, 9, 10, 11, 12]]
    assert len(found.first_token_seconds) == 5 and found.rate > 0
    assert max(library.passes) == concurrency


def test_the_contestant_answers_one_prompt(library):
    contestant = llama_cpp.llama_cpp(llama_cpp.LlamaCpp(Path("model.gguf"), sequences=1, context=64), (END,), 4)
    run = contestant.run([[30, 31]])
    assert run.answers == [[32, 33, 34, 35]] and run.passes == 3


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(cpu_peers.decode, "ours", lambda *_, **__: [])
    missing = ImportError("no", name="llama_cpp")
    monkeypatch.setattr(cpu_peers.contestants, "load_transformers", lambda *_: (_ for _ in ()).throw(missing))
    lm = types.SimpleNamespace(config=types.SimpleNamespace(eos_ids=(END,)))
    with pytest.raises(UserError, match=r'llama_cpp is not installed: pip install -e "\.\[peers\]"'):
        cpu_peers.alone(lm, cpu_peers.SamplingParams(), [[[1]]])


def test_the_memory_is_that_of_the_command():
    small, large = (
        cpu_peers.peak_mb([sys.executable, "-c", f"import time; x = bytearray({mb} << 20); time.sleep(0.2)"])
        for mb in (1, 200)
    )
    assert 190 < large - small < 210
    with pytest.raises(UserError, match="ended with exit code 3"):
        cpu_peers.peak_mb([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_report_is_two_tables_and_a_line():
    one = {"tokens_per_second": 90.0, "first_token_ms": 20.0, "kappa": 1.0}
    served = {"concurrency": 4, "tokens_per_second": 200.0, "first_token_ms": 30.0}
    found = {
        "target": "t",
        "max_new_tokens": 9,
        "machine": {"device": "a machine", "cores": 2},
        "alone": [
            one | {"contestant": "plain", "over": {"llama.cpp": 1.5, "transformers": 3.0}},
            one | {"contestant": "llama.cpp", "over": {"plain": 0.667, "transformers": 2.0}},
        ],
        "served": [served | {"contestant": "auto", "over_llama_cpp": 1.25}],
        "peak_mb": {"this project": 900},
    }
    text = report.markdown(found)
    assert "| plain | 90 | 1.50x | 3.00x | 20 | 1.00 |" in text and "| llama.cpp | 90 | 1.00x | 2.00x |" in text
    assert "| 4 | auto | 200 | 1.25x | 30 |" in text and "this project 900 MB" in text
