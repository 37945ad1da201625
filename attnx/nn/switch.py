"""Giving a model other mechanisms in place of those that it was built with."""

from collections.abc import Sequence

from flax import nnx

from attnx.mechanism import Mechanism
from attnx.nn.attention import Attention
from attnx.nn.frozen import hold


def set_mechanism(model: nnx.Module, mechanism: Mechanism | Sequence[Mechanism]) -> int:
    """Changes the mechanism of the attention layers of a model in place; its weights stay.

    Args:
      model: any module. Layers that a :class:`attnx.nn.Stack` evaluates by one scan are one layer here, and take mechanisms without arrays only.
      mechanism: one for all layers, or one for each in the order in which they are found: by the names and indices of attributes.

    Returns:
      How many layers there are.

    Raises:
      ValueError: as many mechanisms as there are layers are expected.

    Example:
      >>> import attnx
      >>> layer = Attention(8, 2, mechanism=attnx.pairs(mask=attnx.masks.causal()), rngs=nnx.Rngs(0))
      >>> set_mechanism(layer, attnx.pairs(mask=attnx.masks.sliding_window(4)))
      1
    """
    found = [(path, module) for path, module in nnx.iter_modules(model) if isinstance(module, Attention)]
    layers = [module for _, module in sorted(found, key=lambda x: [(isinstance(part, str), part) for part in x[0]])]
    each = list(mechanism) if isinstance(mechanism, (list, tuple)) else [mechanism] * len(layers)
    if len(each) != len(layers):
        raise ValueError(f"mechanism: expected one, or one for each of the {len(layers)} attention layers, got {len(each)}")
    for layer, new in zip(layers, each):
        layer.mechanism = nnx.data(held) if isinstance(held := hold(new), nnx.Module) else held
    return len(layers)
