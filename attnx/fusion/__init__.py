"""Many inputs into few."""

from attnx import lazy

_LAZY: dict[str, tuple[str, ...]] = {
    "acmil": ("ACMIL", "MILOutput", "MultiHeadACMIL", "Pooled", "acmil_loss", "branch_diversity_loss", "branch_pool", "gated_mil_scores", "mask_top_instances"),
    "perceiver": ("LatentCrossAttention", "Perceiver", "PerceiverBlock", "fourier_features", "grid_positions"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
