"""Caches and what is kept of the past."""

from attnx import lazy

_LAZY: dict[str, tuple[str, ...]] = {
    "compressive_memory": ("InfiniAttention", "InfiniState", "infini_attention", "infini_init", "infini_segment", "infini_step", "memory_retrieve", "memory_update"),
    "recurrent_attention": ("GatedUnit", "RAN", "RANCarry", "RANOutput", "RANState", "RanNet", "SwishAttention", "document_windows", "second_moment_norm"),
    "slim": ("MemoryReport", "SlimAttention", "SlimWeights", "memory_report", "slim_attend", "slim_convert", "slim_from_mha", "x_attend"),
    "weighted_groups": ("WeightedGQA", "convert_mha_to_gqa", "fold_gqa", "weighted_group_kv"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
