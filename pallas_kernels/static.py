"""The static half of a composed attention: parts without their arrays, for tile functions to close over."""

import dataclasses

import jax

from pallas_kernels.parts import Mask, Score, Weights
from pallas_kernels.products import Products


class _Hole:
    """Stands for an array in the static half of a part, so that ``field is not None`` still tells which arrays exist."""

    def __repr__(self):
        return "array"

    def __jax_array__(self):
        raise TypeError("a part read one of its arrays inside a tile; declare it in operands() and use the block")


HOLE = _Hole()


@dataclasses.dataclass(frozen=True)
class Parts:
    """The static half of a composed attention: what a tile function closes over. Hashable, free of arrays."""

    scores: tuple[Score, ...]
    mask: Mask | None
    weights: Weights
    scale: float
    dropout_rate: float = 0.0
    products: Products = Products()
    real: bool = False  # no position is padding, so tiles need not look


def strip(tree):
    """A part with every array replaced by a placeholder: hashable, and an error when a tile function reaches for the array."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [HOLE] * len(leaves))
