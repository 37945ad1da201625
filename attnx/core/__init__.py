"""The engines, argument checks and small primitives; what everybody calls is exported by :mod:`attnx`."""

from attnx import lazy

_LAZY = {
    "moments": ("adain",),
    "pooling": ("adaptive_average_pool", "pool_bins"),
    "windows": ("window_attention",),
    "partial_states": ("SoftmaxState", "lean_attention_decode", "softmax_state_finish", "softmax_state_identity", "softmax_state_merge", "softmax_state_of"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
