"""The drafters by name: what `DraftConfig.drafter` may say."""

from __future__ import annotations

from specformer_jax.config import DraftConfig, TargetConfig
from specformer_jax.drafters.base import Drafter
from specformer_jax.drafters.dflash import DFlash
from specformer_jax.drafters.eagle import Eagle
from specformer_jax.drafters.kv_reuse import KVReuse
from specformer_jax.drafters.logitspec import LogitSpec
from specformer_jax.drafters.medusa import Medusa
from specformer_jax.drafters.ngram import NGram
from specformer_jax.drafters.specformer import SpecFormer

_CLASSES: dict[str, type[Drafter]] = {
    "specformer": SpecFormer,
    "medusa": Medusa,
    "eagle": Eagle,
    "dflash": DFlash,
    "kv": KVReuse,
    "ngram": NGram,
    "logitspec": LogitSpec,
}


def make(target: TargetConfig, config: DraftConfig, dtype: str = "bfloat16") -> Drafter:
    """The drafter that a bound configuration names."""
    return _CLASSES[config.drafter](target, config, dtype)
