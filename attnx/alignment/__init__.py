"""Attention between a source and what is made of it."""

from attnx import lazy

_LAZY: dict[str, tuple[str, ...]] = {
    "luong": ("LuongAttention", "LuongDecoder", "LuongState", "attentional_hidden", "luong_global_attention",
              "luong_local_attention", "luong_scores", "predicted_centre"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
