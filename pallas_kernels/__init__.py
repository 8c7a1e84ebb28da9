"""The kernels of speculative decoding: each a public function, its jnp reference, bodies in Pallas and C++."""

from pallas_kernels.attention.api import mixed_mask_attention
from pallas_kernels.attention.places import Places
from pallas_kernels.attention.ragged import ragged_attention
from pallas_kernels.dispatch import Choice, lowering_for, why
from pallas_kernels.masks import may_attend
from pallas_kernels.noise import gumbel
from pallas_kernels.norm.api import grouped_rms_norm_downsample, rms_norm
from pallas_kernels.product.api import matmul
from pallas_kernels.product.cpu import PackedMatrix, pack, pack_four_bits, packs_four_bits, unpack
from pallas_kernels.rotary.api import split_and_rotate
from pallas_kernels.sampling.api import Accepted, Sample, accept, sample_hidden, sample_logits
from pallas_kernels.sampling.reference import lm_head_logits
from pallas_kernels.sampling.threshold import logit_threshold
from pallas_kernels.swiglu.api import swiglu

__all__ = [
    "Accepted",
    "Choice",
    "PackedMatrix",
    "Places",
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
    "pack",
    "pack_four_bits",
    "packs_four_bits",
    "ragged_attention",
    "rms_norm",
    "sample_hidden",
    "sample_logits",
    "split_and_rotate",
    "swiglu",
    "unpack",
    "why",
]
