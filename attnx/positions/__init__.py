"""Positions: transforms of queries and keys, and embeddings added to tokens. Pure functions, one mechanism a file."""

from attnx import lazy
from attnx.positions.axial import AxialRotary, axial_rotary
from attnx.positions.learned import learned
from attnx.positions.rotary import Rotary, rotary
from attnx.positions.sinusoidal import sinusoidal

_LAZY = {"fourier": ("FourierPosition", "fope", "fope_expand", "fope_frequencies", "fope_init", "fope_tables"),
         "shaw": ("RelativePositions", "RelativeSelfAttention", "edge_label_attention", "relative_attention", "skew", "unskew")}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = ["AxialRotary", "Rotary", "axial_rotary", "learned", "rotary", "sinusoidal", *(name for names in _LAZY.values() for name in names)]
