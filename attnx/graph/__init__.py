"""Attention over the edges of graphs."""

from attnx import lazy

_LAZY: dict[str, tuple[str, ...]] = {
    "gatv2": ("GraphAttention", "dense_graph_attention", "gat_scores", "gatv2_scores", "graph_attention", "ranking_is_static"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
