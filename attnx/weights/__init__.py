"""Weights: how the scores of a row become the weights of the values."""

from attnx import lazy
from attnx.weights.clipped_softmax import clipped_softmax
from attnx.weights.entmax import entmax, entmax15, sparsemax
from attnx.weights.hash_collision import collision
from attnx.weights.laplace import laplace, relu_squared
from attnx.weights.relu import relu
from attnx.weights.sigmoid import sigmoid
from attnx.weights.softmax import softmax
from attnx.weights.softpick import softpick
from attnx.weights.taylor import taylor
from pallas_kernels.parts import Exponential, Root, Sum, Weights

_LAZY = {"quantizable_attention": ("GatedAttention", "HeadGate", "gated_attention", "init_gate")}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = ["Exponential", "Root", "Sum", "Weights", "clipped_softmax", "collision", "entmax", "entmax15", "laplace", "relu", "relu_squared", "sigmoid", "softmax",
           "softpick", "sparsemax", "taylor", *(name for names in _LAZY.values() for name in names)]
