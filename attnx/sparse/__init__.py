"""Mechanisms on the selected engine: which keys a query attends to depends on the data."""

from attnx import lazy
from attnx.sparse.topk_blocks import topk_blocks

_LAZY = {
    "bernoulli_sampling": ("YosoAttention", "bucket_cumulate", "bucket_query", "lsh_codes", "yoso_expectation", "yoso_sample"),
    "mixture_of_blocks": ("MoBA", "moba", "moba_attention", "moba_dispatch", "moba_gate", "moba_layers"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = ["topk_blocks", *(name for names in _LAZY.values() for name in names)]
