"""Published heads draft what plain torch drafts from the same files, and are accepted as often."""

import itertools

import pytest

from specformer_jax.batch.trace import Pass, trace
from specformer_jax.config import SamplingParams
from specformer_jax.loading.language_model import load
from tests.loading.published import random_pairs

pytestmark = pytest.mark.parity

PROMPT, NEW, DRAFTS = [9, 4, 21, 34, 7, 55, 2], 32, 4
EAGLE, DFLASH = random_pairs.eagle3, random_pairs.dflash
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
WINDOWS = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9, "use_sliding_window": True}
HEADS = {  # the target's architecture, who writes the head, and how
    "sglang": ("llama", EAGLE, ("sglang",), {}),
    "sglang, hooks": ("qwen3", EAGLE, ("sglang",), {"hooks": (1, 3, 3)}),
    "sglang, 3.1": ("qwen3", EAGLE, ("sglang",), {"fc_norm": True, "norm_output": True}),
    "speculators": ("qwen3", EAGLE, ("speculators",), {"norm_before_residual": True}),
    "speculators, qwen3": ("llama", EAGLE, ("speculators", "qwen3"), {"hooks": (0, 1, 2, 3)}),
    "speculators, norms": ("llama", EAGLE, ("speculators",), {"norm_before_fc": True, "embed_requires_grad": True}),
    "dflash, z-lab": ("qwen3", DFLASH, ("z-lab",), {}),
    "dflash, speculators": ("llama", DFLASH, ("speculators",), {}),
    "dflash, one window": ("qwen3", DFLASH, ("z-lab",), {"layer": MIXED}),
    "dflash, one window, none causal": ("qwen3", DFLASH, ("z-lab",), {"layer": MIXED, "is_causal": False}),
    "dflash, vLLM's windows": ("llama", DFLASH, ("z-lab",), {"nested": {"use_swa": True, "swa_window_size": 6}}),
    "dflash, windows": ("llama", DFLASH, ("speculators",), {"layer": WINDOWS}),
    "dflash, windows, none causal": (
        "llama",
        DFLASH,
        ("speculators",),
        {"layer": WINDOWS, "sliding_window_non_causal": True},
    ),
}


@pytest.mark.parametrize("head", HEADS)
def test_drafts_and_acceptance_are_those_of_torch(head, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.loading.published import torch_heads

    architecture, write, layout, switches = HEADS[head]
    target = random_pairs.target(tmp_path / "target", architecture)
    folder = write(tmp_path / "head", *layout, **switches)
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    kind = torch_heads.DFlash if write is DFLASH else torch_heads.Eagle3
    reference = kind(folder, model.model.embed_tokens.weight, model.lm_head.weight)
    with torch.no_grad():
        expected = decode(model, reference)
    lm = load(str(target), draft=str(folder), lookup=False, dtype="float32")
    found = trace(lm, PROMPT, SamplingParams(max_new_tokens=NEW), draft_length=DRAFTS)
    assert found == expected
    assert len(found) > 1 and all(len(each.drafts) == DRAFTS for each in found[1:])


def decode(model, head) -> list[Pass]:
    """The passes of greedy speculative decoding, each over the whole sequence."""
    import torch

    tokens, passes, drafts = list(PROMPT), [], []
    while len(tokens) < len(PROMPT) + NEW:
        out = model(torch.tensor([tokens + drafts]), output_hidden_states=True)
        own = out.logits[0].argmax(-1).tolist()[len(tokens) - 1 :]
        right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(drafts, own, strict=False)))
        committed = own[: right + 1][: len(PROMPT) + NEW - len(tokens)]
        passes.append(Pass(tuple(drafts), tuple(committed)))
        tokens += committed
        drafts = head.draft([states[0] for states in out.hidden_states], tokens, DRAFTS)
    return passes
