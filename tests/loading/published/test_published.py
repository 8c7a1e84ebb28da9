"""Published heads of both kinds and layouts: the target's own tokens, and one sentence for what is not run."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pallas_kernels import cpu
from specformer_jax.batch import generation
from specformer_jax.config import SamplingParams
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import load
from specformer_jax.loading.published import description, head
from specformer_jax.loading.target_config import read_config
from tests.loading.broken import ODD_VALUES, edit_config
from tests.loading.published import random_pairs

PROMPTS = [[9, 4, 21, 34, 7, 55, 2], [13, 8]]
SAMPLED = SamplingParams(temperature=0.7, seed=5, max_new_tokens=16)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_pairs.target(tmp_path_factory.mktemp("target"), "qwen3")


def answers(lm) -> dict[int, generation.Answer]:
    return dict(generation.generate_ids(lm, PROMPTS, sampling_params=SAMPLED, draft_length=lm.model.max_draft_length))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_answers_are_the_targets_own(target, dtype, tmp_path):
    if dtype == "bfloat16" and (reason := cpu.unavailable()):
        pytest.skip(reason)  # then another number of tokens a step may flip a near tie
    plain = answers(load(str(target), draft="none", dtype=dtype))
    for write in (random_pairs.eagle3, random_pairs.dflash):
        folder = write(tmp_path / write.__name__, "speculators")
        lm = load(str(target), draft=str(folder), dtype=dtype)
        assert lm.draft_name == str(folder) and lm.acceptance is None
        got = answers(lm)
        assert [got[i].token_ids for i in (0, 1)] == [plain[i].token_ids for i in (0, 1)]
        assert sum(sum(answer.accepted_per_position) for answer in got.values()) > 0, "no draft was right"


def test_what_a_head_reads_and_how_many_tokens_it_drafts(target, tmp_path):
    config = read_config(target)

    def drafter(write, *layout, **switches):
        return description.describe(write(tmp_path, *layout, **switches), config, "float32").drafter

    eagle, dflash = random_pairs.eagle3, random_pairs.dflash
    assert drafter(eagle, "sglang").config.hook_layers == (2, 2, 1)
    assert drafter(eagle, "sglang", hooks=(1, 2, 3)).config.hook_layers == (1, 2, 3)
    assert drafter(eagle, "speculators", hooks=(1, 2, 3)).config.hook_layers == (1, 2, 3)
    assert drafter(eagle, "speculators").config.max_draft_length == description.EAGLE_DRAFTS
    assert drafter(eagle, "sglang", fc_norm=True).hook_norm == "each"
    for layout in ("z-lab", "speculators"):
        read = drafter(dflash, layout, hooks=(1, 2, 3), block=6).config
        assert read.hook_layers == (1, 2, 3) and read.max_draft_length == 5 and read.draft_blocks == 2


def test_dflash_values_at_the_top(target, tmp_path):
    """As later heads of z-lab have them, and scales that change nothing."""
    folder = random_pairs.dflash(tmp_path, "z-lab", output_multiplier=1.0)
    wanted = description.describe(folder, read_config(target), "float32")
    stored = json.loads((folder / "config.json").read_text())
    nested = stored.pop("dflash_config")
    (folder / "config.json").write_text(json.dumps(stored | nested))
    assert description.describe(folder, read_config(target), "float32") == wanted


SLIDING, FULL = "sliding_attention", "full_attention"
SPANS = {  # what a DFlash head of two layers says of its windows, and what each layer reads
    "nothing": ("z-lab", {}, [(None, True), (None, True)]),
    "full": ("z-lab", {"layer": {"layer_types": [FULL] * 2, "sliding_window": 9}}, [(None, True), (None, True)]),
    "one": ("z-lab", {"layer": {"layer_types": [SLIDING, FULL], "sliding_window": 9}}, [(9, False), (None, True)]),
    "none causal": (
        "z-lab",
        {"layer": {"layer_types": [SLIDING, FULL], "sliding_window": 9}, "is_causal": False},
        [(9, True), (None, True)],
    ),
    "all causal": ("z-lab", {"nested": {"causal": True}}, [(None, False), (None, False)]),
    "vLLM": ("z-lab", {"nested": {"use_swa": True, "swa_window_size": 9}}, [(9, True), (9, True)]),
    "vLLM, by the decoder's window": (
        "z-lab",
        {"layer": {"layer_types": [FULL] * 2, "sliding_window": 8}, "nested": {"use_swa": True, "causal": True}},
        [(8, False), (8, False)],
    ),
    "from a layer on": (
        "speculators",
        {"layer": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}},
        [(None, True), (9, False)],
    ),
    "turned off": ("speculators", {"layer": {"use_sliding_window": False, "sliding_window": 9}}, [(None, True)] * 2),
    "speculators": (
        "speculators",
        {"layer": {"layer_types": [FULL, SLIDING], "sliding_window": 9}},
        [(None, True), (9, False)],
    ),
    "speculators, none causal": (
        "speculators",
        {"layer": {"layer_types": [FULL, SLIDING], "sliding_window": 9}, "sliding_window_non_causal": True},
        [(None, True), (9, True)],
    ),
}


@pytest.mark.parametrize("what", SPANS)
def test_the_windows_of_a_dflash_head(target, what, tmp_path):
    layout, switches, expected = SPANS[what]
    folder = random_pairs.dflash(tmp_path, layout, **switches)
    assert list(description.describe(folder, read_config(target), "float32").drafter.spans) == expected


def test_names_of_another_program_and_weights_in_parts(target, tmp_path):
    """A prefix before every name, rotary frequencies among the tensors, two files with an index."""
    folder, config = random_pairs.eagle3(tmp_path, "sglang"), read_config(target)
    wanted = head.read(folder, config, "float32")
    tensors = {f"model.{name}": x for name, x in load_file(folder / "model.safetensors").items()}
    tensors["model.midlayer.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    got = head.read(folder, config, "float32")
    assert np.array_equal(got.params["qkv"]["kernel"], wanted.params["qkv"]["kernel"])
    assert got.vocab["token_ids"].tolist() == list(random_pairs.DRAFT_IDS)


EAGLE, DFLASH = random_pairs.eagle3, random_pairs.dflash
REFUSED = {
    "another kind": (EAGLE, "speculators", {"speculators_model_type": "peagle"}, "peagle: the published heads that"),
    "another architecture": (
        EAGLE,
        "sglang",
        {"architectures": ["MedusaModel"]},
        "MedusaModel: the published heads that",
    ),
    "layers": (EAGLE, "sglang", {"num_hidden_layers": 2}, "has 2 layers: EAGLE-3 is run with one"),
    "width": (EAGLE, "sglang", {"hidden_size": 64}, "is for width 64, the target has 32"),
    "vocabulary": (EAGLE, "sglang", {"vocab_size": 65}, "is for vocab_size 65, the target has 64"),
    "target's width": (
        EAGLE,
        "speculators",
        {"target_hidden_size": 64},
        "is for target_hidden_size 64, the target has 32",
    ),
    "window": (EAGLE, "sglang", {"layer_types": ["sliding_attention"]}, "cannot be run: .* sliding window attention"),
    "biases": (EAGLE, "sglang", {"attention_bias": True}, "cannot be run: .* attention_bias"),
    "rotary": (EAGLE, "sglang", {"rope_scaling": {"rope_type": "yarn"}}, "rotary scaling 'yarn'"),
    "no hooks": (
        EAGLE,
        "sglang",
        {"eagle_config": {"use_aux_hidden_state": False}},
        "reads one hidden state alone",
    ),
    "far hooks": (EAGLE, "speculators", {"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, "reach past the target's 4"),
    "both norms": (EAGLE, "sglang", {"fc_norm": True, "norm_before_fc": True}, "exclude each other"),
    "parallel": (EAGLE, "sglang", {"parallel_drafting": True}, "drafts in parallel by mask_hidden, which"),
    "DSpark": (DFLASH, "z-lab", {"dflash_config": {"projector_type": "dspark"}}, "no DFlash head with projector_type"),
    "anchor": (DFLASH, "speculators", {"sample_from_anchor": True}, "drafts from the anchor itself"),
    "no mask": (DFLASH, "z-lab", {"dflash_config": {"target_layer_ids": [1]}}, "lacks 'mask_token_id'"),
    "mask": (DFLASH, "speculators", {"mask_token_id": 64}, "mask_token_id 64 is no token of the target"),
    "unhooked": (DFLASH, "speculators", {"aux_hidden_state_layer_ids": None}, "does not say which hidden states"),
    "block": (DFLASH, "z-lab", {"block_size": 1}, "a block_size of 1 holds no draft"),
    "layer types": (
        DFLASH,
        "z-lab",
        {"layer_types": [FULL]},
        "must be full_attention or sliding_attention, one for each",
    ),
    "no window": (DFLASH, "z-lab", {"layer_types": [SLIDING] * 2}, "lacks 'sliding_window'"),
    "short window": (
        DFLASH,
        "z-lab",
        {"layer_types": [SLIDING] * 2, "sliding_window": 5},
        "a window of 5 is shorter than the block of 6",
    ),
    "window turned off": (
        DFLASH,
        "z-lab",
        {"layer_types": [SLIDING] * 2, "sliding_window": 9, "use_sliding_window": False},
        "layer_types has windows that use_sliding_window turns off",
    ),
    "shifted": (DFLASH, "speculators", {"shift_label": True}, "no DFlash head with shift_label"),
    "Domino": (DFLASH, "speculators", {"projector_type": "domino"}, "no DFlash head with projector_type"),
    "scaled": (DFLASH, "z-lab", {"input_embedding_scale": 32.0}, "no DFlash head with input_embedding_scale"),
    "sinks": (DFLASH, "z-lab", {"dflash_config": {"attention_sink_bias": True}}, "with attention_sink_bias"),
    "sinks at the top": (DFLASH, "z-lab", {"add_swa_attention_sink_bias": True}, "with add_swa_attention_sink_bias"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_one_sentence_for_what_is_not_run(target, what, tmp_path):
    write, layout, changes, sentence = REFUSED[what]
    edit_config(write(tmp_path, layout), **changes)
    with pytest.raises(UserError, match=sentence) as raised:
        description.describe(tmp_path, read_config(target), "float32")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("write", [EAGLE, DFLASH])
@pytest.mark.parametrize("layout", ["speculators", "other"])
def test_odd_values_anywhere(target, write, layout, tmp_path):
    write(tmp_path, {("other", EAGLE): "sglang", ("other", DFLASH): "z-lab"}.get((layout, write), layout))
    stored, config = json.loads((tmp_path / "config.json").read_text()), read_config(target)
    for key in stored:
        for value in ODD_VALUES:
            (tmp_path / "config.json").write_text(json.dumps(stored | {key: value}))
            try:
                description.describe(tmp_path, config, "float32")
            except UserError as error:
                assert "\n" not in str(error)


BROKEN = {
    "missing": ({"norm.weight": None}, "has no tensor norm.weight"),
    "misshapen": ({"fc.weight": np.zeros((32, 64), np.float32)}, r"tensor fc.weight has shape \(32, 64\)"),
    "too many": ({"mask_hidden": np.zeros(3, np.float32)}, "holds mask_hidden, which a head of its config.json does"),
    "no map": ({"d2t": None}, "has no tensor d2t"),
    "short map": ({"d2t": np.zeros(3, np.int64)}, "d2t must hold 8 whole numbers"),
    "wild map": ({"d2t": np.full(8, 64)}, "d2t leads out of the target's 64 tokens"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_weights(target, what, tmp_path):
    changes, sentence = BROKEN[what]
    file = random_pairs.eagle3(tmp_path, "speculators") / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: x for name, x in tensors.items() if x is not None}, file)
    with pytest.raises(UserError, match=sentence):
        head.read(tmp_path, read_config(target), "float32")


def test_a_head_by_its_hub_id(target, tmp_path, monkeypatch):
    folder = random_pairs.eagle3(tmp_path, "speculators")
    asked = []
    monkeypatch.setattr("specformer_jax.loading.fetch.hub_snapshot", lambda hub_id: asked.append(hub_id) or folder)
    lm = load(str(target), draft="organisation/a-head", dtype="float32")
    assert asked == ["organisation/a-head"] and lm.draft_name == str(folder)
