"""The kernels of speculative decoding: each a public function, its jnp reference and its Pallas bodies."""

from pallas_kernels.attention import mixed_mask_attention
from pallas_kernels.dispatch import Choice, lowering_for, why
from pallas_kernels.masks import may_attend
from pallas_kernels.noise import gumbel
from pallas_kernels.norm import grouped_rms_norm_downsample
from pallas_kernels.product import matmul
from pallas_kernels.threshold import logit_threshold
from pallas_kernels.verification import Acceptance, Sample, accept, lm_head_logits, sample_hidden, sample_logits

__all__ = [
    "Acceptance",
    "Choice",
    "Sample",
    "accept",
    "grouped_rms_norm_downsample",
    "gumbel",
    "lm_head_logits",
    "logit_threshold",
    "lowering_for",
    "matmul",
    "may_attend",
    "mixed_mask_attention",
    "sample_hidden",
    "sample_logits",
    "why",
]
