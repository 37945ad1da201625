"""Masks: which pairs are allowed. They see logical positions, compose with ``&``, ``|`` and ``~``, and know which tiles they leave empty or full."""

from attnx import lazy
from attnx.masks.causal import causal
from attnx.masks.documents import documents
from attnx.masks.explicit import explicit
from attnx.masks.lengths import lengths
from attnx.masks.local import local, sliding_window
from attnx.masks.predicate import predicate
from attnx.masks.prefix import prefix
from attnx.masks.strided import dilated, strided_columns, within_blocks
from pallas_kernels.parts import Cover, Mask

_LAZY = {"mswa": ("MSWAttention", "MultiScaleWindow", "PerHeadWindow", "mswa_mechanisms", "mswa_windows", "multi_scale_window", "multi_window_attention",
                  "per_head_window"),
         "grid": ("Neighborhood", "TilePlan", "neighborhood", "neighborhood_attention", "neighborhood_plan"),
         "grid_order": ("token_permute", "token_unpermute")}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = ["Cover", "Mask", "causal", "dilated", "documents", "explicit", "lengths", "local", "predicate", "prefix", "sliding_window",
           "strided_columns", "within_blocks", *(name for names in _LAZY.values() for name in names)]
