"""Scores: what is added to, or done to, the scaled dot products before they become weights."""

from attnx import lazy
from attnx.scores.alibi import alibi, alibi_slopes
from attnx.scores.bias import bias
from attnx.scores.elementwise import elementwise
from attnx.scores.soft_cap import soft_cap
from attnx.scores.t5_bias import t5_bias, t5_bucket
from pallas_kernels.parts import Score, Similarity

_LAZY = {"forgetting_transformer": ("ForgettingAttention", "forgetting", "forgetting_attention")}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = ["Score", "Similarity", "alibi", "alibi_slopes", "bias", "elementwise", "soft_cap", "t5_bias", "t5_bucket",
           *(name for names in _LAZY.values() for name in names)]
