"""What one training experiment is: frozen, checked, written as Python in `configs/`."""

from __future__ import annotations

import dataclasses
import runpy
import typing
from pathlib import Path

from specformer_jax.config import LOOKUPS, DraftConfig, TargetConfig
from specformer_jax.errors import UserError, require
from specformer_jax.training import ranges

HIGHEST_RATE = 1e3  # of learning and of decay: beyond it every float32 overflows within a few steps
BOOLS = {"true": True, "1": True, "false": False, "0": False}  # how an override says them


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How the target answers prompts.

    Attributes:
      temperatures: each answer takes one of these, by a hash of its prompt's id and the seed; the paper has (0.0,).
      max_new_tokens: answers are cut there; the paper has 512.
      max_prompt_tokens: prompts that are longer are left out.
      batch_size: how many answers are decoded together.
      shard_size: how many prompts one shard holds.
      samples: how many answers each dialogue gets, each with a seed and a temperature of its own; all but the first at
        a temperature above 0, as greedy ones would be alike.
      seed: decides the sampling noise, and which answer takes which temperature.
      mesh: how many devices each process uses along (data, fsdp, model).
    """

    temperatures: tuple[float, ...] = (0.0,)
    max_new_tokens: int = 512
    max_prompt_tokens: int = 512
    batch_size: int = 64
    shard_size: int = 1024
    samples: int = 1
    seed: int = 0
    mesh: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self):
        require(
            ranges.count("distill.max_new_tokens", self.max_new_tokens),
            ranges.count("distill.max_prompt_tokens", self.max_prompt_tokens),
            ranges.count("distill.batch_size", self.batch_size),
            ranges.count("distill.shard_size", self.shard_size),
            ranges.count("distill.samples", self.samples),
            ranges.count("distill.seed", self.seed, 0, 2**32 - 2),
            (
                isinstance(self.temperatures, tuple) and len(self.temperatures) >= 1,
                f"distill.temperatures {self.temperatures!r} must name at least one",
            ),
            *(ranges.number("distill.temperatures", temperature, 0, 1e6) for temperature in self.temperatures),
            ranges.mesh("distill.mesh", self.mesh),
        )
        require(
            (
                self.samples == 1 or any(self.temperatures),
                f"{self.samples} samples of greedy answers would be alike: give distill.temperatures above 0",
            )
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One experiment of `train.py`; the defaults are the paper's settings.

    Attributes:
      target: what `language_model.load` takes: a built-in name, a directory, a Hub id or a .gguf file.
      draft: the head that is trained.
      distill: how the training answers are made.
      sequence_length: T, the positions of a packed row.
      batch_rows: how many packed rows one step reads, over all hosts and micro-batches.
      anchors: A, the most positions of a row that forecast (answer positions only); None allows all T. The head's draft
        block and LM head run on A of the T positions.
      accumulation: how many micro-batches make a step; it divides batch_rows.
      steps: how many steps the whole run has; the schedule ends there.
      optimizer: "adamw" or "muon" (matrices by Muon, the rest by AdamW).
      learning_rate: the highest rate of the schedule; with Muon the matrices' alone.
      final_learning_rate: the rate at the last step.
      adam_learning_rate: the highest rate for what Muon leaves to AdamW; None takes learning_rate.
      schedule: how the rate falls after the warm-up, "cosine" or "linear".
      warmup: the share of the steps in which the rate rises.
      weight_decay: how strongly the matrices are drawn to zero.
      clip: gradients of a larger norm are scaled down to it; 0 is off.
      soft: the share of the KL to the target's own distribution in the loss; the rest is cross-entropy on tokens.
      slot_decay: slot j weighs slot_decay ** j; 1 is the paper's plain mean.
      init: "identity" (see `specformer.SpecFormer`); "target": attention and FFN inputs also start as the last layer's;
        or the directory of an exported head to go on from, whose draft vocabulary is then kept if it has the size asked
        for. It may grow: more slots, more draft blocks and wider FFNs begin as with "target", and but for more slots it
        forecasts at first what it did. Of a sequential FFN that is to be narrower the units that weigh most stay.
      dtype: "bfloat16" or "float32", what the arithmetic is done in; the parameters are float32.
      remat: compute the head's activations again in the backward pass, instead of keeping them.
      mesh: how many devices are used along (data, fsdp, model).
      seed: decides the initial parameters and the shuffle.
      checkpoint_every: how many steps lie between checkpoints.
      keep_last: how many of the newest checkpoints are kept.
      keep_best: how many checkpoints are kept for the highest kappa.
      log_every: how many steps a line of metrics covers; at a checkpoint, where held-out answers are counted and at the
        end it may be fewer. Metrics leave the device, and are checked to be finite, only then.
    """

    target: str = "smollm2-135m"
    draft: DraftConfig = DraftConfig()
    distill: DistillConfig = DistillConfig()
    sequence_length: int = 1024
    batch_rows: int = 32
    anchors: int | None = None
    accumulation: int = 1
    steps: int = 10_000
    optimizer: str = "adamw"
    learning_rate: float = 5e-4
    final_learning_rate: float = 1e-5
    adam_learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 0.0
    soft: float = 0.0
    slot_decay: float = 1.0
    init: str = "identity"
    dtype: str = "bfloat16"
    remat: bool = False
    mesh: tuple[int, int, int] = (1, 1, 1)
    seed: int = 0
    checkpoint_every: int = 500
    keep_last: int = 3
    keep_best: int = 1
    log_every: int = 10

    def __post_init__(self):
        require(
            (type(self.target) is str and bool(self.target), f"target {self.target!r} must be the name of a model"),
            (isinstance(self.draft, DraftConfig), f"draft {self.draft!r} must be a DraftConfig"),
            (isinstance(self.distill, DistillConfig), f"distill {self.distill!r} must be a DistillConfig"),
            ranges.one_of("optimizer", self.optimizer, "adamw", "muon"),
            ranges.one_of("schedule", self.schedule, "cosine", "linear"),
            ranges.one_of("dtype", self.dtype, "bfloat16", "float32"),
            ranges.one_of("remat", self.remat, True, False),
            (
                type(self.init) is str and (self.init in ("identity", "target") or Path(self.init).is_dir()),
                f"init {self.init!r} must be identity, target or the directory of a head",
            ),
            ranges.number("learning_rate", self.learning_rate, 0, HIGHEST_RATE),
            ranges.number("final_learning_rate", self.final_learning_rate, 0, HIGHEST_RATE),
            ranges.number("adam_learning_rate", self.adam_learning_rate or 0, 0, HIGHEST_RATE),
            ranges.number("weight_decay", self.weight_decay, 0, HIGHEST_RATE),
            ranges.number("clip", self.clip, 0, 1e6),
            ranges.number("soft", self.soft, 0, 1),
            ranges.number("slot_decay", self.slot_decay, 1e-6, 1),
            ranges.number("warmup", self.warmup, 0, 0.999),
            ranges.count("seed", self.seed, 0, 2**32 - 1),
            ranges.count("steps", self.steps),
            ranges.count("checkpoint_every", self.checkpoint_every),
            ranges.count("log_every", self.log_every),
            ranges.count("keep_last", self.keep_last),
            ranges.count("keep_best", self.keep_best, 0),
            ranges.count("sequence_length", self.sequence_length, 8, 2**24),
            ranges.count("batch_rows", self.batch_rows, 1, 2**24),
            ranges.count("accumulation", self.accumulation, 1, 2**24),
            *([] if self.anchors is None else [ranges.count("anchors", self.anchors, 1, self.sequence_length)]),
            ranges.mesh("mesh", self.mesh),
        )
        require(
            (
                self.batch_rows % self.accumulation == 0,
                f"batch_rows {self.batch_rows} does not divide into accumulation {self.accumulation} micro-batches",
            ),
            (
                self.anchors is None or not self.draft.attends_context,
                "a head with attends_context reads every position: leave anchors at None",
            ),
            (
                self.draft.drafter != "specformer"
                or (self.draft.window or self.sequence_length) >= self.sequence_length,
                f"draft.window {self.draft.window} is shorter than sequence_length {self.sequence_length}: training "
                "reads whole sequences, so make the window as long",
            ),
        )

    @property
    def micro_rows(self) -> int:
        """Packed rows of one micro-batch."""
        return self.batch_rows // self.accumulation

    def bind(self, target: TargetConfig) -> BoundConfig:
        """This experiment with its head bound to a target; what depends on the target is checked.

        Raises:
          UserError: a drafter without parameters, a mesh that the batch does not fit, a head that the target cannot
            have, or one without the last hook.
        """
        if (drafter := self.draft.drafter) in LOOKUPS:
            raise UserError(f"the {drafter} drafter has nothing to train: generate with --draft {drafter}")
        data, fsdp, _ = self.mesh
        draft = self.draft.bind(target)
        require(
            (
                self.micro_rows % (data * fsdp) == 0,
                f"{self.micro_rows} rows of a micro-batch do not divide over data {data} x fsdp {fsdp} devices",
            ),
            (
                target.layers in draft.hook_layers,
                f"training reads the target's last layer: put {target.layers} into hook_layers",
            ),
        )
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return BoundConfig(**(fields | {"draft": draft}))


class BoundConfig(TrainConfig):
    """A `TrainConfig` whose head knows its target's layers and sizes; `TrainConfig.bind` makes it, once a run."""


def load_config(path: str | Path, overrides: typing.Sequence[str] = (), drafter: str | None = None) -> TrainConfig:
    """Runs get_config() of a configuration file and applies "field=value" or "draft.field=value" overrides.

    Args:
      path: the configuration file.
      overrides: fields and their new values.
      drafter: trains another drafter than the file's in the same way, on the hook layers of that drafter's choice.

    Raises:
      UserError: no such file, one that raises or returns something else, an unknown field or a value of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no configuration file {path}")
    config = _run(path)
    if drafter not in (None, config.draft.drafter):
        other = dataclasses.replace(config.draft, drafter=drafter, hook_layers=())
        config = dataclasses.replace(config, draft=other)
    changes: dict[str, dict[str, typing.Any]] = {"": {}}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override!r} must look like field=value")
        section, _, field = name.rpartition(".")
        changes.setdefault(section, {})[field] = _value(config, section, field, text, override)
    # All at once: values that only go together must not be refused one by one.
    top = changes.pop("")
    top |= {section: dataclasses.replace(getattr(config, section), **fields) for section, fields in changes.items()}
    return dataclasses.replace(config, **top)


def _run(path: Path) -> TrainConfig:
    """What get_config() of a configuration file returns."""
    try:
        names = runpy.run_path(str(path))
        if not callable(names.get("get_config")):
            raise UserError(f"{path} has no get_config()")
        config = names["get_config"]()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever its Python raises
        reason = " ".join(str(error).split())
        raise UserError(f"the configuration file {path} raises {type(error).__name__}: {reason}") from error
    if not isinstance(config, TrainConfig):
        raise UserError(f"get_config() of {path} returns a {type(config).__name__}, not a TrainConfig")
    return config


def _value(config: TrainConfig, section: str, field: str, text: str, override: str) -> typing.Any:
    owner = getattr(config, section, None) if section else config
    if not dataclasses.is_dataclass(owner):
        raise UserError(f"--set {override!r}: {section!r} has no fields")
    kinds = typing.get_type_hints(type(owner))
    if field not in kinds:
        raise UserError(f"--set {override!r}: {type(owner).__name__} has no field {field!r}")
    if dataclasses.is_dataclass(kinds[field]):
        raise UserError(f"--set {override!r}: name one of its fields, {field}.FIELD=VALUE")
    try:
        return _parse(text, kinds[field])
    except (ValueError, TypeError) as error:
        raise UserError(f"--set {override!r}: {text!r} is no {_said(kinds[field])}") from error


def _said(kind: typing.Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _parse(text: str, kind: typing.Any) -> typing.Any:
    """The value that a text stands for in a field of this type.

    Raises:
      ValueError, TypeError: the text stands for no such value.
    """
    options = typing.get_args(kind)
    if type(None) in options:
        if text.lower() == "none":
            return None
        (kind,) = (option for option in options if option is not type(None))
        return _parse(text, kind)
    if typing.get_origin(kind) is tuple:
        return tuple(options[0](part) for part in text.split(",") if part)
    if kind is bool:
        if text.lower() not in BOOLS:
            raise ValueError(f"{text!r} is neither true nor false")
        return BOOLS[text.lower()]
    return kind(text)
