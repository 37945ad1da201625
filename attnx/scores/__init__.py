"""Scores: what is added to, or done to, the scaled dot products before they become weights."""

from attnx import lazy
from attnx.scores.alibi import alibi, alibi_slopes
from attnx.scores.bias import bias
from attnx.scores.elementwise import elementwise
from attnx.scores.soft_cap import soft_cap
from attnx.scores.t5_bias import t5_bias, t5_bucket
from pallas_kernels.parts import Score, Similarity

_LAZY = {
    "fewer_projections": ("EfficientAttention", "OptimisedAttention", "SuperAttention", "align_values", "attention_cost", "efficient_attention", "efficient_from_mha",
                          "optimised_attention", "optimised_from_mha", "super_attention"),
    "forgetting_transformer": ("ForgettingAttention", "forgetting", "forgetting_attention"),
    "localized_filtering": ("LocalizedFilteringAttention", "YuanBlock", "localized_filter", "localized_filter_init", "yuan_heads"),
    "multi_token": ("Mixing", "MultiTokenAttention", "MultiTokenMechanism", "head_mix", "identity_kernel", "identity_mix", "key_query_conv",
                    "multi_token_attention"),
    "selective": ("SelectiveAttention", "SelectiveMechanism", "allocate_budgets", "memory_loss", "prune_cache", "selection_penalty", "selective_attention"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = ["Score", "Similarity", "alibi", "alibi_slopes", "bias", "elementwise", "soft_cap", "t5_bias", "t5_bucket",
           *(name for names in _LAZY.values() for name in names)]
