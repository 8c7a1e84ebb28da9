"""Frozen, hashable descriptions of the models and of a request: no arrays, no behaviour beyond checks.

One letter per dimension, in every annotation and comment of the project, and nowhere for anything else:

    B rows             T tokens read together: a flat batch's, or each sequence's   S seats of a flat batch: its rows
    C positions of a row                D width                                    N query heads
    K key/value heads  H head size      F inner width of an FFN                    V vocabulary
    L layers           J draft slots    G hooks of the draft head                  A anchors of a row
    P pages, p positions of a page      R rows that are sampled (kernels), or packed (training)
    W window: most tokens of a row in a step
"""

from __future__ import annotations

import dataclasses

from specformer_jax.errors import UserError, require

ARCHITECTURES = ("llama", "qwen2", "qwen3")
TRAINED = ("specformer", "medusa", "eagle", "dflash", "kv")
LOOKUPS = ("ngram", "logitspec")  # drafters without parameters, for any target
DRAFTERS = (*TRAINED, *LOOKUPS)
REUSES = ("hidden", "kv", "hybrid")  # what the blocks of the drafter "kv" read of the context
LARGEST_DRAFT, LARGEST_FFN, LARGEST_WINDOW = 64, 2**20, 2**24  # no head that pays comes near them
MOST_BAD_WORDS, LONGEST_BAD_WORD = 128, 16  # of a request; tokens of one


def _whole(name: str, value: object, most: int) -> tuple[bool, str]:
    """A check for `require`."""
    return type(value) is int and 1 <= value <= most, f"{name} {value!r} must be a whole number from 1 to {most}"


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1 frequency scaling of the rotary embedding (Hugging Face `rope_type: llama3`)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """The frozen language model that verifies drafts: a Llama, Qwen2 or Qwen3 decoder.

    Attributes:
      architecture: one of `ARCHITECTURES`.
      vocab_size: V.
      width: D.
      layers: L.
      heads: N; a multiple of `kv_heads`.
      kv_heads: K.
      head_size: H.
      ffn: F, the inner width of the SwiGLU FFN.
      context: the most positions the model was made for.
      rope_theta: base of the rotary frequencies.
      rope_scaling: Llama-3.1 scaling, or None.
      rms_epsilon: added to the mean square in every RMS norm.
      qkv_bias: whether query, key and value products carry a bias (Qwen2).
      qk_norm: whether each query and key head is RMS-normed (Qwen3).
      tied_embeddings: whether the LM head is the embedding matrix.
      eos_ids: the tokens that end an answer.
    """

    architecture: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    context: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_epsilon: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"unknown architecture {self.architecture!r}: this project runs {', '.join(ARCHITECTURES)} decoders"
            )
        if self.heads % self.kv_heads:
            raise UserError(f"{self.heads} query heads are no multiple of {self.kv_heads} key/value heads")

    @property
    def default_hooks(self) -> tuple[int, ...]:
        """The paper's hook layers: the embedding output, the middle, the last but one and the last layer."""
        return (0, self.layers // 2, self.layers - 1, self.layers)


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """The draft head (paper section 3); the defaults are the paper's configuration.

    The drafters it is compared with (`drafters/`) read J, the hook layers, the draft vocabulary, in EAGLE, DFlash and
    KV reuse `ffn`, in these last two `draft_blocks`, in KV reuse `reuse` and `kv_layers`; the other switches are those
    of the SpecFormer head.

    Attributes:
      max_draft_length: J, the slots the head forecasts.
      hook_layers: indices i of the hidden states HS[i] it reads; HS[0] is the embedding output. Empty: the drafter's
        own choice (the paper's for SpecFormer).
      bidirectional: draft attention sees all slots; False is the paper's causal ablation (Table 4).
      positional_ffn: one D -> J*D product makes the slots; False is the plain position embedding (Table 4).
      ffn: inner width of the draft block's SwiGLU FFN; None takes the target's F.
      draft_blocks: how many draft blocks follow each other.
      next_token_hook: the embedding hook reads the token after the position in place of its own.
      attends_context: the draft block also attends to the anchor's causal context, through the keys and
        values that the context attention has cached.
      window: how many positions back the context attention reads, rounded up to pages; None: all. A head that was
        trained on short sequences drafts better with a window of their length.
      draft_vocab_size: columns of the draft's pruned vocabulary; None drafts over the whole vocabulary.
      sequential_ffn: inner width of an FFN that corrects each slot by the token drafted before it, as Hydra heads do
        (arXiv 2402.05109); None forecasts all slots independently (the paper). The draft's LM head is then read once a
        slot, so prune its vocabulary.
      drafter: one of `DRAFTERS`.
      reuse: what the draft blocks of KV reuse read of the context, one of `REUSES`: keys and values made of the hooks,
        the target's own, or both.
      kv_layers: the target's layers, counted from 0, whose own keys and values they read, one for each draft block.
        Empty: evenly spread, the last block reads the last layer.
    """

    max_draft_length: int = 8
    hook_layers: tuple[int, ...] = ()
    bidirectional: bool = True
    positional_ffn: bool = True
    ffn: int | None = None
    draft_blocks: int = 1
    next_token_hook: bool = False
    attends_context: bool = False
    window: int | None = None
    draft_vocab_size: int | None = None
    sequential_ffn: int | None = None
    drafter: str = "specformer"
    reuse: str = "hybrid"
    kv_layers: tuple[int, ...] = ()

    def __post_init__(self):
        require((self.reuse in REUSES, f"draft.reuse {self.reuse!r} must be one of {', '.join(REUSES)}"))

    @property
    def reads_memory(self) -> bool:
        """Whether slots attend to what the drafter keeps of the context: then training forecasts at every position."""
        return self.drafter in ("eagle", "dflash", "kv") or (self.drafter == "specformer" and self.attends_context)

    @property
    def reads_target_kv(self) -> bool:
        """Whether slots attend to the target's own keys and values."""
        return self.drafter == "kv" and self.reuse != "hidden"

    def bind(self, target: TargetConfig) -> DraftConfig:
        """This configuration with what depends on the target filled in.

        Raises:
          UserError: an unknown drafter, a size out of its range, a layer that the target does not have,
            `next_token_hook` without the embedding hook, or a draft vocabulary larger than the target's.
        """
        if self.drafter not in DRAFTERS:
            raise UserError(f"unknown drafter {self.drafter!r}: it must be one of {', '.join(DRAFTERS)}")
        require(
            _whole("max_draft_length", self.max_draft_length, LARGEST_DRAFT),
            _whole("draft_blocks", self.draft_blocks, LARGEST_DRAFT),
            _whole("ffn", 1 if self.ffn is None else self.ffn, LARGEST_FFN),
            _whole("sequential_ffn", 1 if self.sequential_ffn is None else self.sequential_ffn, LARGEST_FFN),
            _whole("window", 1 if self.window is None else self.window, LARGEST_WINDOW),
            (
                self.window is None or not self.attends_context,
                "draft blocks that attend to the context have no window: leave window or attends_context out",
            ),
        )
        hooks = self.hook_layers or self._default_hooks(target)
        if not all(type(hook) is int and 0 <= hook <= target.layers for hook in hooks):
            raise UserError(f"hook layers {hooks} reach past the target's {target.layers} layers")
        if self.drafter == "specformer" and self.next_token_hook and 0 not in hooks:
            raise UserError("next_token_hook needs the embedding hook: put layer 0 into hook_layers")
        if self.draft_vocab_size is not None and not 0 < self.draft_vocab_size <= target.vocab_size:
            raise UserError(f"draft_vocab_size {self.draft_vocab_size} is not within 1 to {target.vocab_size}")
        kv_layers = self._bound_kv_layers(target) if self.reads_target_kv else ()
        return dataclasses.replace(self, hook_layers=tuple(hooks), ffn=self.ffn or target.ffn, kv_layers=kv_layers)

    def _bound_kv_layers(self, target: TargetConfig) -> tuple[int, ...]:
        count = self.draft_blocks
        layers = self.kv_layers or tuple(-(-(i + 1) * target.layers // count) - 1 for i in range(count))
        fits = len(layers) == count and all(type(layer) is int and 0 <= layer < target.layers for layer in layers)
        require((fits, f"kv_layers {layers} must be {count}, one a draft block, within 0 and {target.layers - 1}"))
        return layers

    def _default_hooks(self, target: TargetConfig) -> tuple[int, ...]:
        spread = tuple(sorted({1 + round(i * (target.layers - 1) / 4) for i in range(5)}))
        return {
            "specformer": target.default_hooks,
            "medusa": (target.layers,),
            "eagle": (min(2, target.layers // 2), target.layers // 2, target.layers),
            "dflash": spread,
            "kv": (target.layers,) if self.reuse == "kv" else spread,  # of which it reads none
            "ngram": (),
            "logitspec": (target.layers,),
        }[self.drafter]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled; the processors apply in this order, as in transformers.

    Attributes:
      temperature: 0 is greedy, and so is what is below 1e-5.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of tokens whose probability reaches p; 1 keeps all.
      min_p: keep tokens at least min_p times as likely as the likeliest; 0 keeps all.
      seed: with the prompt and the other values it fixes every token of the answer.
      max_new_tokens: the answer is cut there.
      logit_bias: (token, what is added to its logit); applies before all others, and the penalties after it.
      repetition_penalty: logits of tokens in prompt or answer are divided by it, or multiplied if negative; 1 is off.
      frequency_penalty: is taken from the logit of a token as often as the answer has it.
      presence_penalty: is taken from the logits of tokens that the answer has.
      bad_words: sequences of tokens that the answer does not have: the last token of one is never chosen behind the
        others.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_new_tokens: int = 256
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bad_words: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        require(
            (0 <= self.temperature <= 1e6, f"temperature {self.temperature} must be within 0 (greedy) and 1e6"),
            (0 <= self.top_k < 2**31, f"top-k {self.top_k} must be within 0 (off) and 2**31 - 1"),
            (0 < self.top_p <= 1, f"top-p {self.top_p} must be above 0 and at most 1 (off)"),
            (0 <= self.min_p <= 1, f"min-p {self.min_p} must be within 0 (off) and 1"),
            (0 <= self.seed < 2**32, f"seed {self.seed} must be within 0 and 2**32 - 1"),
            (1 <= self.max_new_tokens < 2**31, f"max-new-tokens {self.max_new_tokens} must be within 1 and 2**31 - 1"),
            (len(self.logit_bias) <= 300, f"logit-bias has {len(self.logit_bias)} tokens, more than 300"),
            (
                all(token >= 0 and abs(x) <= 1e6 for token, x in self.logit_bias),
                "a logit-bias must be within -1e6 and 1e6",
            ),
            (
                0 < self.repetition_penalty <= 1e3,
                f"repetition-penalty {self.repetition_penalty} must be above 0 and at most 1e3",
            ),
            (
                abs(self.frequency_penalty) <= 1e3,
                f"frequency-penalty {self.frequency_penalty} must be within -1e3 and 1e3",
            ),
            (
                abs(self.presence_penalty) <= 1e3,
                f"presence-penalty {self.presence_penalty} must be within -1e3 and 1e3",
            ),
            (
                len(self.bad_words) <= MOST_BAD_WORDS,
                f"bad-words are {len(self.bad_words)} sequences of tokens, more than {MOST_BAD_WORDS}",
            ),
            (
                all(1 <= len(word) <= LONGEST_BAD_WORD and min(word) >= 0 for word in self.bad_words),
                f"a bad word must have 1 to {LONGEST_BAD_WORD} tokens",
            ),
        )

    @property
    def processes(self) -> bool:
        """Whether logits are changed before anything is ruled out."""
        penalised = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        return penalised or bool(self.logit_bias) or bool(self.bad_words)

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p may rule tokens out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static shape of one set of compiled programs.

    Attributes:
      rows: B.
      window: tokens of a row that one step reads, 1 + the drafts of a step; a step of all rows reads rows * window.
      chunk: prompt tokens of a row that one step reads; a step of all rows reads rows * chunk.
      positions: C, positions that prompt and answer of a row may take.
    """

    rows: int
    window: int
    chunk: int
    positions: int


def bucket(size: int, smallest: int = 16) -> int:
    """The least of smallest * {1, 1.5, 2, 3, 4, 6, 8, ...} that is at least `size`.

    >>> [bucket(n) for n in (1, 17, 25, 100, 700)]
    [16, 24, 32, 128, 768]
    """
    power = smallest
    while power < size:
        if power * 3 // 2 >= size:
            return power * 3 // 2
        power *= 2
    return power
