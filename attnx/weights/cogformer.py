"""Cog attention: weights of either sign, so that a head can take away as well as add.

Lv, Xie, Li, Liao, Sun, Kang, Wang, Yan: "More Expressive Attention with Negative Weights" (2024, arXiv 2411.07176):

    w_ij = sgn(s_ij) e^|s_ij| / sum_j e^|s_ij|

The absolute values of a row sum to 1, its sum lies between -1 and 1; where no score is negative it is softmax, and a query turned round turns
its output round. One head can find the difference of two values, for which softmax needs two heads. Unlike softmax it depends on where zero is. The paper keeps
softmax in the first and the last layer (Cogformer, and a U-ViT of the same kind): :func:`cogformer_mechanisms`. How much of a model's weight is negative, and
whether its tokens collapse, is in :mod:`attnx.analysis`.

A mask acts on the weights: a score of -inf added as a bias would weigh more than any other, since its absolute value is what counts.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from attnx.core import checks
from attnx.masks.causal import causal
from attnx.mechanism import Pairs, pairs
from attnx.weights.softmax import softmax
from pallas_kernels.parts import Exponential, Mask, part, static


@part
class Cog(Exponential):
    """See :func:`cog`."""

    zero: str = static(default="drop")

    def shift(self, s):
        return jnp.where(s < 0, -s, s)

    def terms(self, s, m):
        size = jnp.exp(self.shift(s) - m)
        size = jnp.where(s == 0, 0, size) if self.zero == "drop" else size
        return jnp.where(s < 0, -size, size), size


def cog(zero: str = "drop") -> Exponential:
    """Signed softmax of the absolute scores: ``sgn(s) e^|s|`` over the row's sum of ``e^|s|``.

    Args:
      zero: what a score of exactly 0 is, which has no sign: "drop" leaves its key out, as the released code does; "keep" takes it for positive.

    Raises:
      ValueError: for another ``zero``.

    The sign has no gradient: that of a weight is softmax's in ``|s|``, times signs. Costs as softmax; folds in one pass, in every execution.

    >>> import attnx, jax.numpy as jnp
    >>> q, k = jnp.ones((1, 1, 1, 1)), jnp.log(jnp.array([3.0, 1 / 6, 1.0])).reshape(1, 3, 1, 1)
    >>> w = attnx.attention_weights(q, k, weights=attnx.weights.cog())
    >>> [f"{x:.3f}" for x in w[0, 0, 0]]
    ['0.333', '-0.667', '0.000']
    """
    if zero not in ("drop", "keep"):
        raise ValueError(f"zero: expected 'drop' or 'keep', got {zero!r}")
    return Cog(zero)


def cogformer_mechanisms(num_layers: int, *, keep_softmax_layers: Sequence[str | int] = ("first", "last"), mask: Mask | None = causal(), zero: str = "drop",
                         **options) -> tuple[Pairs, ...]:
    """The mechanisms of a Cogformer's layers: softmax in those that are kept, Cog in all others.

    Args:
      num_layers: of the model.
      keep_softmax_layers: "first", "last" or the indices of layers.
      mask: which pairs are allowed; None for an encoder or a U-ViT.
      zero: as in :func:`cog`.
      **options: scores, scale, dropout_rate, implementation as in :func:`attnx.pairs`.

    Returns:
      One mechanism a layer: what :class:`attnx.models.Decoder`, or any other of the models, is handed.

    Raises:
      ValueError, TypeError: layers that do not exist, named.

    >>> from flax import nnx
    >>> from attnx.models import Decoder, TransformerConfig
    >>> model = Decoder(TransformerConfig(features=32, num_layers=4), cogformer_mechanisms(4), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((1, 5), int)).shape
    (1, 5, 256)
    """
    checks.check_integer("num_layers", num_layers, least=1)
    kept = {{"first": 0, "last": num_layers - 1}.get(layer, layer) if isinstance(layer, str) else layer for layer in keep_softmax_layers}
    for layer in kept:
        if isinstance(layer, str):
            raise ValueError(f"keep_softmax_layers: expected 'first', 'last' or indices, got {layer!r}")
        checks.check_integer("keep_softmax_layers", layer, least=0, most=num_layers - 1)
    return tuple(pairs(mask=mask, weights=softmax() if layer in kept else cog(zero), **options) for layer in range(num_layers))
