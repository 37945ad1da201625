"""Attention in space and on curved domains."""

from attnx import lazy

_LAZY: dict[str, tuple[str, ...]] = {
    "attention_on_sphere": ("AttentionS2", "NeighborhoodAttentionS2", "s2_attention", "s2_neighborhood_attention", "s2_neighborhood_index", "sphere_quadrature"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
