"""Attention in images."""

from attnx import lazy

_LAZY: dict[str, tuple[str, ...]] = {}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
