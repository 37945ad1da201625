"""attnx: attention mechanisms as pure JAX functions, on engines that make them fast and long."""

from attnx import lazy, masks, products, scores, weights
from attnx.catalogue import cite
from attnx.core.attention import attention, ring_attention
from attnx.core.decode import cascade, decode
from attnx.core.edges import edge_attention
from attnx.core.halves import apply, attend_scores, attention_scores, attention_weights, merge, row_statistics
from attnx.core.linear import linear_attention
from attnx.core.selected import selected_attention
from attnx.dot_product import dot_product_attention
from attnx.mechanism import Mechanism, pairs, recurrent
from pallas_kernels.parts import At, Operand

_ROOMS = ("alignment", "analysis", "catalogue", "fusion", "geometry", "graph", "linear", "memory", "mixers", "models", "nn", "objectives", "positions", "pretrained",
          "sparse", "steering", "training", "vision")
__getattr__, __dir__ = lazy.attach(__name__, {}, _ROOMS)
__version__ = "0.1.0"

__all__ = ["At", "Mechanism", "Operand", "apply", "attend_scores", "attention", "attention_scores", "attention_weights", "cascade", "cite", "decode",
           "dot_product_attention", "edge_attention", "linear_attention", "masks", "merge", "pairs", "products", "recurrent", "ring_attention",
           "row_statistics", "scores", "selected_attention", "weights"]
