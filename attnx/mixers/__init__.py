"""Mixing tokens without queries and keys, or before them."""

from attnx import lazy

_LAZY: dict[str, tuple[str, ...]] = {
    "fftnet": ("FFTNetBlock", "FFTNetClassifier", "FFTNetMixer", "modrelu", "resize_filter", "spectral_mix"),
    "mega": ("EMA", "MegaLayer", "NormalizedFFN", "gated_attention", "multihead_ema", "rotary_table"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
