"""The sizes and variants of a target: `config.json` or the metadata of a GGUF file -> `TargetConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specformer_jax import files
from specformer_jax.config import ARCHITECTURES, RopeScaling, TargetConfig
from specformer_jax.errors import UserError, require
from specformer_jax.loading.gguf_reader import open_gguf

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_config(path: Path) -> TargetConfig:
    """The configuration of the model at a `weights.resolve`d path.

    Raises:
      UserError: there is no model, or one that this project does not run; the sentence says why.
    """
    if path.suffix == ".gguf":
        config = open_gguf(path).config()
    else:
        if not (path / "config.json").exists():
            raise UserError(f"{path} has no config.json: give a Hugging Face model directory or the .gguf file itself")
        file = path / "config.json"
        config = parse_decoder(Settings(file, files.read_json_object(file)), _end_tokens(path))
    for token in config.eos_ids:
        if type(token) is not int or not 0 <= token < config.vocab_size:
            raise UserError(
                f"{path} ends its answers with {token!r}, which is none of the model's {config.vocab_size} token ids:"
                " correct its eos_token_id"
            )
    return config


def read_sampling_defaults(path: Path) -> dict[str, float]:
    """How the model at a `weights.resolve`d path wants to be sampled: what its generation_config.json says of it.

    Returns:
      The values by their names there: temperature, top_p, top_k, min_p, repetition_penalty, as many as are given.

    Raises:
      UserError: one of them is no number.
    """
    file = path / "generation_config.json"
    if path.suffix == ".gguf" or not file.exists():
        return {}
    stored = Settings(file, files.read_json_object(file))
    given = [name for name in _SAMPLING if stored.values.get(name) is not None]
    return {name: stored.number(name) for name in given}


def _end_tokens(folder: Path) -> tuple[Any, ...]:
    """What generation_config.json says of how an answer ends, and config.json where that says nothing."""
    ends = None
    if (folder / "generation_config.json").exists():
        ends = files.read_json_object(folder / "generation_config.json").get("eos_token_id")
    if ends is None:
        ends = files.read_json_object(folder / "config.json").get("eos_token_id")
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def parse_decoder(stored: Settings, eos_ids: tuple[Any, ...] = (), windows: bool = False) -> TargetConfig:
    """A decoder by the values of transformers 4 or 5; a key that is absent or null takes transformers' default.

    Args:
      stored: the values.
      eos_ids: the tokens that end an answer.
      windows: layers may have sliding windows; the caller runs those of `sliding_layers`.

    Raises:
      UserError: values that no decoder has, or one that this project does not run.
    """
    architecture = stored.values.get("model_type")
    if architecture not in ARCHITECTURES:
        raise UserError(f"a {architecture!r} model: this project runs {', '.join(ARCHITECTURES)} decoders")
    layers, heads = stored.count("num_hidden_layers"), stored.count("num_attention_heads")
    width = stored.count("hidden_size")
    activation = stored.values.get("hidden_act", "silu")
    refused = {
        "sliding window attention": not windows and any(sliding_layers(stored, layers)),
        "attention_bias": stored.flag("attention_bias"),
        "mlp_bias": stored.flag("mlp_bias"),
        f"hidden_act {activation!r}": activation not in ("silu", "swish"),  # two names of one function
        "quantized safetensors": stored.values.get("quantization_config") is not None,
    }
    for what, found in refused.items():
        if found:
            raise UserError(f"this {architecture} model uses {what}, which this project does not run")
    head_size = stored.count("head_dim", 128 if architecture == "qwen3" else max(width // heads, 1))
    theta, scaling = _parse_rope(stored)
    require((head_size % 2 == 0, f"{stored.file}: heads of size {head_size} cannot be rotated in pairs"))
    return TargetConfig(
        architecture=architecture,
        vocab_size=stored.count("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=stored.count("num_key_value_heads", heads),
        head_size=head_size,
        ffn=stored.count("intermediate_size"),
        context=stored.count("max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_epsilon=stored.number("rms_norm_eps", 1e-6),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        tied_embeddings=stored.flag("tie_word_embeddings"),
        eos_ids=eos_ids,
    )


def sliding_layers(stored: Settings, layers: int) -> list[bool]:
    """Which layers attend over a sliding window: by `layer_types`, else as transformers derives it.

    Raises:
      UserError: layers of another kind, too few of them, or windows that `use_sliding_window` turns off.
    """
    types, full, sliding = stored.list("layer_types")[:layers], "full_attention", "sliding_attention"
    windowed = stored.flag("use_sliding_window", bool(types))
    if not types:
        first = stored.number("max_window_layers", 28)
        windowed = windowed and stored.values.get("sliding_window") is not None
        return [windowed and i >= first for i in range(layers)]
    if len(types) != layers or any(kind not in (full, sliding) for kind in types):
        raise UserError(f"{stored.file}: layer_types {types!r} must be {full} or {sliding}, one for each layer")
    if sliding in types and not windowed:
        raise UserError(f"{stored.file}: layer_types has windows that use_sliding_window turns off")
    return [kind == sliding for kind in types]


def _parse_rope(stored: Settings) -> tuple[float, RopeScaling | None]:
    """`rope_theta` and `rope_scaling` of transformers 4, or `rope_parameters` of transformers 5."""
    given = stored.values.get("rope_parameters") or stored.values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise UserError(f"{stored.file} describes its rotary positions by {given!r}, which is no object")
    rope = Settings(stored.file, given)
    theta = rope.number("rope_theta", stored.number("rope_theta", 10000.0))
    require((theta > 0, f"{stored.file}: rope_theta {theta} must be above 0"))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"rotary scaling {kind!r} is not run by this project: only default and llama3")
    original = rope.count("original_max_position_embeddings", stored.count("max_position_embeddings"))
    factor, low, high = (rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    require(
        (factor > 0, f"{stored.file}: the factor {factor} of its rotary scaling must be above 0"),
        (0 < low < high, f"{stored.file}: low_freq_factor {low} must be above 0 and below high_freq_factor {high}"),
    )
    return theta, RopeScaling(factor, low, high, original)


class Settings:
    """The values of a configuration, with a sentence for each that is missing or of another kind.

    Attributes:
      file: where they were read, for the sentences.
      values: the values as JSON has them.
    """

    def __init__(self, file: Path, values: dict[str, Any]):
        self.file = file
        self.values = values

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of things, at least one."""
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value < 2**31:
            raise UserError(f"{self.file}: {key} {value!r} must be a whole number from 1 to {2**31 - 1}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number that is not negative."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 <= value < 1e30:
            raise UserError(f"{self.file}: {key} {value!r} must be a number from 0 to 1e30")
        return float(value)

    def whole(self, key: str) -> int:
        """A whole number from 0 on, a token's say."""
        value = self._get(key, None)
        if type(value) is not int or not 0 <= value < 2**31:
            raise UserError(f"{self.file}: {key} {value!r} must be a whole number from 0 to {2**31 - 1}")
        return value

    def object(self, key: str) -> Settings:
        """The values within an object; absent is empty."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise UserError(f"{self.file}: {key} {value!r} must be an object")
        return Settings(self.file, value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise UserError(f"{self.file}: {key} {value!r} must be true or false")
        return value

    def list(self, key: str) -> list[Any]:
        """A list; absent is empty."""
        value = self._get(key, [])
        if not isinstance(value, list):
            raise UserError(f"{self.file}: {key} {value!r} must be a list")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise UserError(f"{self.file} lacks {key!r}")
        return default if value is None else value
