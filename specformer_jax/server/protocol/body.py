"""What all bodies have in common: strict types, null as not given, and a word about every field that is not served."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from specformer_jax.server.errors import ApiError

log = logging.getLogger(__name__)

# Fields that say nothing about the answer.
_IGNORED = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",  # of what the answer will be: a hint for speed
        "cache_prompt",
        "keep_alive",
        "request_id",
        "max_tool_calls",  # of tools that OpenAI runs itself
        "priority",
        "spaces_between_special_tokens",
        "guided_decoding_backend",
    )
)
# Fields that may change an answer, with the values that ask for nothing: all that a kind of request takes of them where
# it has not the field itself.
_NEUTRAL: dict[str, tuple] = {
    "length_penalty": (1,),
    "logits_processors": ([],),
    "allowed_token_ids": ([],),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "best_of": (1,),
    "num_beams": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "echo": (False,),
    "prompt_logprobs": (False,),
    "suffix": ("",),
    "include_stop_str_in_output": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "modalities": (["text"],),
    "audio": ({},),
    "verbosity": ("medium",),
    "web_search_options": ({},),
    "documents": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "reasoning_effort": ("none",),
    "top_logprobs": (0,),
    "include": ([],),
    "truncation": ("disabled",),
}


class Body(BaseModel):
    """An object that a client sends; fields that it does not know are refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """null is as good as not given."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


def without_unserved(data: dict[str, Any], served: Collection[str]) -> dict[str, Any]:
    """The fields of a request without those that ask for nothing.

    Args:
      data: the request as it came.
      served: the fields that this kind of request has.

    Raises:
      ApiError: a field would change the answer, and this kind of request has it not.
    """
    kept = {}
    for field, value in data.items():
        if field in _IGNORED:
            _say_ignored(field)
        elif field in served or field not in _NEUTRAL:
            kept[field] = value
        elif value is not None and value not in _NEUTRAL[field]:
            message = f"{field} would change the answer and is not supported here: leave it out"
            raise ApiError(400, message, param=field, code="unsupported_field")
    return kept


@functools.cache
def _say_ignored(field: str) -> None:
    """Once a field, however often it comes."""
    log.warning("clients send %s, which says nothing about an answer: it is ignored", field)
