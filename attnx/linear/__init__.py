"""Mechanisms on the recurrent engine."""

from attnx import lazy
from attnx.core.linear import elu_plus_one

_LAZY: dict[str, tuple[str, ...]] = {
    "cosine_attention": ("CottentionAttention", "CottentionState", "cosine_attention_init", "cosine_attention_step", "cosine_linear_attention"),
    "fastmax": ("FastmaxAttention", "fastmax_attention", "fastmax_init", "fastmax_step"),
    "feature_maps": ("Taylor", "symmetric_monomials", "unit"),
    "agents": ("AgentAttention", "agent_attention", "agent_patch", "pool_agents"),
    "efficient": ("EfficientAttention2d", "efficient_attention", "efficient_attention_causal", "efficient_init", "efficient_step"),
    "latent_states": ("LatteAttention", "LatteWindowAttention", "latte", "latte_init", "latte_step", "latte_window"),
    "lightning_attention_2": ("TNLAttention", "lightning_attention", "lightning_slopes", "lightning_step"),
    "log_normal_attention": ("LLNAttention", "LLNState", "block_diag_attention", "fit_moment_constants", "lln_attention", "lln_diag", "lln_init", "lln_step",
                             "moment_match"),
    "orthogonal_memory_attention": ("LAVO", "lavo_attention", "lavo_init", "lavo_step", "orthogonal_memory", "orthonormal"),
    "rank_augmented": ("RALA2d", "RavltBlock", "SoftmaxModulated2d", "kv_rank", "output_rank", "rala", "token_weights"),
    "linformer": ("LinformerAttention", "LinformerProjection", "linformer_attention", "project_sequence"),
    "softmax_over_positions": ("PositionSoftmaxState", "position_softmax", "position_softmax_attention", "position_softmax_init"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = ["elu_plus_one", *(name for names in _LAZY.values() for name in names)]
