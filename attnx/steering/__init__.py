"""Changing what a given model attends to."""

from attnx import lazy

_LAZY = {"cross_image": ("APPEARANCE", "OUTPUT", "STRUCTURE", "CrossImageSchedule", "contrast_softmax", "contrast_weights", "cross_image_hooks",
                         "cross_image_qkv", "rescale_noise", "swap_guidance")}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
