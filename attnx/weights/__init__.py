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
from pallas_kernels.parts import Exponential, Extent, Root, Sum, Weights

_LAZY = {
    "cogformer": ("cog", "cogformer_mechanisms"),
    "length_scaled": ("LengthScaledAttention", "UnitLength", "lssa", "lssar_attention", "reweight"),
    "marginal_probability": ("brute_force_marginals", "edge_pairs", "marginal_attention", "posterior_edges"),
    "quantizable_attention": ("GatedAttention", "HeadGate", "gated_attention", "init_gate"),
    "selective_self_attention": ("SelectiveSelfAttention", "TokenTemperature", "position_temperature", "temperature_scaled_attention", "token_temperature"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = ["Exponential", "Extent", "Root", "Sum", "Weights", "clipped_softmax", "collision", "entmax", "entmax15", "laplace", "relu", "relu_squared", "sigmoid",
           "softmax", "softpick", "sparsemax", "taylor", *(name for names in _LAZY.values() for name in names)]
