"""Caches and what is kept of the past."""

from attnx import lazy

_LAZY: dict[str, tuple[str, ...]] = {
    "recurrent_attention": ("GatedUnit", "RAN", "RANCarry", "RANOutput", "RANState", "RanNet", "SwishAttention", "document_windows", "second_moment_norm"),
    "slim": ("MemoryReport", "SlimAttention", "SlimWeights", "memory_report", "slim_attend", "slim_convert", "slim_from_mha", "x_attend"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
