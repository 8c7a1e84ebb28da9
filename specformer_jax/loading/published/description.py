"""What a published head is, by its `config.json`.

speculators writes the decoder under `transformer_layer_config`, and hooks as hidden states HS[i]; SGLang's programs and
z-lab write the decoder's values at the top, and hooks as layers, whose outputs are meant: HS[i + 1].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from specformer_jax import files
from specformer_jax.config import DraftConfig, TargetConfig
from specformer_jax.drafters.base import Drafter
from specformer_jax.drafters.dflash import DFlash, Span
from specformer_jax.drafters.eagle3 import Eagle3
from specformer_jax.errors import UserError, require
from specformer_jax.loading.target_config import Settings, parse_decoder, sliding_layers

EAGLE_DRAFTS = 5  # what an EAGLE-3 head drafts at most where its file does not say: each is a pass of its layer
_DFLASH_READ = {"mask_token_id", "target_layer_ids", "block_size", "causal", "use_swa", "swa_window_size"}
_DFLASH_PLAIN = {  # other values are other architectures
    "attention_mode": "gqa",
    "projector_type": "dflash",
    "input_embedding_scale": 1,
    "output_multiplier": 1,
}
_DFLASH_REFUSED = {"final_logit_softcapping", "shift_label", "attention_sink_bias", "add_swa_attention_sink_bias"}


class Description(NamedTuple):
    """A head before its weights are read.

    Attributes:
      drafter: what drafts with them.
      decoder: the sizes of its layers.
      columns: V', the columns of its own LM head; None where it has none.
      maps: whether a column stands for another token than that of its number.
      mask_token: the token whose embedding is DFlash's mask; None for EAGLE-3.
      embeds: whether it has an embedding of its own.
    """

    drafter: Drafter
    decoder: TargetConfig
    columns: int | None
    maps: bool
    mask_token: int | None
    embeds: bool


def is_published(folder: Path) -> bool:
    """Whether a folder holds what another program wrote, and not a head of this project."""
    try:
        values = files.read_json_object(folder / "config.json")
    except UserError:
        return False
    return "format" not in values and bool(values.keys() & {"architectures", "model_type", "speculators_model_type"})


def describe(folder: Path, target: TargetConfig, dtype: str) -> Description:
    """Reads a head's `config.json`.

    Raises:
      UserError: a head of another kind, of a variant that this project does not run, or for another target.
    """
    stored = Settings(folder / "config.json", files.read_json_object(folder / "config.json"))
    speculators = "speculators_model_type" in stored.values
    kind = _kind(stored)
    try:
        decoder = parse_decoder(_layer(stored), windows=kind == "dflash")
    except UserError as error:
        raise UserError(f"the head of {stored.file} cannot be run: {error}") from error
    for what, own, wanted in (
        ("width", decoder.width, target.width),
        ("vocab_size", decoder.vocab_size, target.vocab_size),
        ("target_hidden_size", stored.values.get("target_hidden_size") or target.width, target.width),
    ):
        if own != wanted:
            raise UserError(f"the head of {stored.file} is for {what} {own}, the target has {wanted}")
    refused = {
        "reads one hidden state alone": not stored.object("eagle_config").flag("use_aux_hidden_state", True),
        "drafts in parallel by mask_hidden": stored.flag("parallel_drafting"),
        "drafts from the anchor itself (sample_from_anchor)": stored.flag("sample_from_anchor"),
        "scales its logits": stored.values.get("logit_scale") not in (None, 1),
    }
    for what, asked in refused.items():
        if asked:
            raise UserError(f"the head of {stored.file} {what}, which this project does not run")
    describe_kind = _dflash if kind == "dflash" else _eagle3
    return describe_kind(stored, speculators, decoder, target, dtype)


def _layer(stored: Settings) -> Settings:
    """What describes the decoder."""
    return stored.object("transformer_layer_config") if "speculators_model_type" in stored.values else stored


def _kind(stored: Settings) -> str:
    """Which of the two it is."""
    v = stored.values
    given = v.get("speculators_model_type") or v.get("architectures") or "something unnamed"
    names = given if isinstance(given, list) else [given]
    if names == ["dflash"] or "DFlashDraftModel" in names:
        return "dflash"
    if names == ["eagle3"] or any("eagle3" in str(name).lower() for name in names):
        return "eagle3"
    if names == ["LlamaForCausalLM"] and "draft_vocab_size" in v:  # as the first EAGLE-3 heads were written
        return "eagle3"
    raise UserError(
        f"{stored.file} describes {', '.join(map(str, names))}: the published heads that this project runs are EAGLE-3"
        " and DFlash"
    )


def _eagle3(
    stored: Settings, speculators: bool, decoder: TargetConfig, target: TargetConfig, dtype: str
) -> Description:
    require((decoder.layers == 1, f"the head of {stored.file} has {decoder.layers} layers: EAGLE-3 is run with one"))
    hooks = stored.list("eagle_aux_hidden_state_layer_ids")
    if not hooks:
        nested = stored.object("eagle_config").list("eagle_aux_hidden_state_layer_ids")
        hooks = _after(stored, nested) or [2, target.layers // 2, target.layers - 3]
    columns = stored.count("draft_vocab_size", decoder.vocab_size)
    config = DraftConfig(
        max_draft_length=max(EAGLE_DRAFTS, _speculative_tokens(stored)),
        hook_layers=tuple(hooks),
        ffn=decoder.ffn,
        draft_vocab_size=columns,
        drafter="eagle",
    )
    each, joined = stored.flag("fc_norm"), stored.flag("norm_before_fc")
    require((not (each and joined), f"{stored.file}: fc_norm and norm_before_fc exclude each other"))
    drafter = Eagle3(
        target,
        config.bind(target),
        dtype,
        decoder=decoder,
        hook_norm="each" if each else "all" if joined else "none",
        norm_before_residual=stored.flag("norm_before_residual"),
        norm_output=stored.flag("norm_output"),
    )
    embeds = speculators and stored.flag("embed_requires_grad")
    return Description(drafter, decoder, columns, columns < decoder.vocab_size, None, embeds)


def _dflash(
    stored: Settings, speculators: bool, decoder: TargetConfig, target: TargetConfig, dtype: str
) -> Description:
    nested = _dflash_settings(stored)
    beside = {name: value for name, value in nested.values.items() if value and name not in _DFLASH_READ}
    odd = sorted(name for name, value in beside.items() if _DFLASH_PLAIN.get(name) != value)
    if odd:
        raise UserError(f"{stored.file}: this project runs no DFlash head with {', '.join(odd)}")
    hooks = (
        stored.list("aux_hidden_state_layer_ids") if speculators else _after(stored, nested.list("target_layer_ids"))
    )
    mask_token = nested.whole("mask_token_id")
    require(
        (bool(hooks), f"{stored.file} does not say which hidden states of the target its head reads"),
        (mask_token < target.vocab_size, f"{stored.file}: mask_token_id {mask_token} is no token of the target"),
    )
    block = nested.count("block_size", 8 if speculators else None)
    require((block > 1, f"{stored.file}: a block_size of {block} holds no draft"))
    columns = stored.count("draft_vocab_size", decoder.vocab_size) if speculators else None
    config = DraftConfig(
        max_draft_length=block - 1,
        hook_layers=tuple(hooks),
        ffn=decoder.ffn,
        draft_blocks=decoder.layers,
        draft_vocab_size=columns,
        drafter="dflash",
    )
    spans = _spans(stored, nested, decoder.layers)
    for window, _ in spans:
        if window is not None and window < block:
            raise UserError(f"{stored.file}: a window of {window} is shorter than the block of {block}")
    drafter = DFlash(target, config.bind(target), dtype, decoder=decoder, spans=spans)
    return Description(drafter, decoder, columns, columns not in (None, decoder.vocab_size), mask_token, False)


def _dflash_settings(stored: Settings) -> Settings:
    """What stands in dflash_config, and of that what stands at the top instead."""
    names = _DFLASH_READ | _DFLASH_PLAIN.keys() | _DFLASH_REFUSED
    top = {name: value for name, value in stored.values.items() if name in names}
    return Settings(stored.file, top | stored.object("dflash_config").values)


def _spans(stored: Settings, nested: Settings, layers: int) -> tuple[Span, ...]:
    """What each layer of a DFlash head reads.

    A layer with a window is causal within the block unless the file says otherwise: speculators by
    `sliding_window_non_causal`, z-lab's program by `is_causal` and vLLM by `causal`, these two of all layers. With
    vLLM's `use_swa` all layers have a window, and none is causal.
    """
    slides = sliding_layers(_layer(stored), layers)
    bidirectional = [not slide or stored.flag("sliding_window_non_causal") for slide in slides]
    if nested.flag("use_swa") and not any(slides):
        slides, bidirectional = [True] * layers, [True] * layers
    for values, name in ((stored, "is_causal"), (nested, "causal")):
        if values.values.get(name) is not None:
            bidirectional = [not values.flag(name)] * layers
    window = None
    if any(slides):
        own = "swa_window_size" in nested.values
        window = nested.count("swa_window_size") if own else _layer(stored).count("sliding_window")
    return tuple(Span(window if slide else None, both) for slide, both in zip(slides, bidirectional, strict=True))


def _after(stored: Settings, layers: list[Any]) -> list[int]:
    """The hidden states after these layers."""
    if not all(type(layer) is int for layer in layers):
        raise UserError(f"{stored.file}: layers {layers!r} must be whole numbers")
    return [layer + 1 for layer in layers]


def _speculative_tokens(stored: Settings) -> int:
    """How many drafts speculators proposes by default; 0 where it does not say."""
    methods = stored.object("speculators_config").list("proposal_methods")
    counts = [method.get("speculative_tokens") for method in methods if isinstance(method, dict)]
    return max([count for count in counts if type(count) is int], default=0)
