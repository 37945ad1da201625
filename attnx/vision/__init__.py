"""Attention in images."""

from attnx import lazy

_LAZY: dict[str, tuple[str, ...]] = {
    "efficient_channel_attention": ("ECA", "eca", "eca_kernel_size", "eca_ns", "se", "se_var1", "se_var2", "se_var3"),
    "neighborhood_attention": ("NATBlock", "NeighborhoodAttention", "dilation_merge", "dilation_partition", "neighborhood_av", "neighborhood_qk"),
    "window_attention": ("SwinBlock", "WindowAttention", "relative_places"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
