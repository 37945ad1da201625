"""Pictures with digits or marks somewhere, and the small models that read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx.vision import NeighborhoodAttention
from experiments.tasks import digits, distant_marks, placed_digits
from experiments.tiny_grid import DepthwiseConv, ShiftedWindows, TinyGrid


@pytest.mark.parametrize("places", ["usual", "new"])
def test_digits_are_where_they_may_be(places):
    data, _ = digits.split(0)
    pictures, labels = placed_digits.sampler(data, 16, places)(jax.random.key(0))
    assert pictures.shape == (16, 24, 24, 1)
    known = {image.tobytes(): int(label) for image, label in zip(np.asarray(data[0]), np.asarray(data[1]))}
    for picture, label in zip(np.asarray(pictures[..., 0]), labels):
        found = [(row, column) for row in range(17) for column in range(17)
                 if known.get(np.ascontiguousarray(picture[row:row + 8, column:column + 8]).tobytes()) == label]
        assert any((row > 8 and column > 8) == (places == "new") for row, column in found)
    with pytest.raises(ValueError, match="places: expected"):
        placed_digits.sampler(data, 1, "any")


def test_marks_are_far_apart_and_stripes_run_as_told():
    batch = distant_marks.sampler(200)(jax.random.key(0))
    assert 60 < batch.same.sum() < 140 and 60 < batch.rows.sum() < 140
    cells = np.asarray(batch.pictures).reshape(200, 14, 2, 14, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(200, 14, 14, 12)
    for picture, same, rows in zip(cells, batch.same, batch.rows):
        marks = [(place, kind) for place in np.ndindex(14, 14) for kind in (0, 1) if (picture[place] == np.tile(distant_marks.COLOURS[kind], 4)).all()]
        assert len(marks) == 2 and (marks[0][1] == marks[1][1]) == bool(same)
        assert max(abs(np.subtract(marks[0][0], marks[1][0]))) * 2 >= distant_marks.APART
        stripes = np.repeat([[1, 1], [-1, -1]] if rows else [[1, -1], [1, -1]], 3, axis=-1).reshape(-1)
        assert 1 <= sum((picture[place] == stripes).all() for place in np.ndindex(14, 14)) <= 4


def test_small_models():
    """All mixers of both claims, with gradients; shifted windows see their own side of a border alone."""
    mixers = [lambda size, rngs: NeighborhoodAttention(size, 2, 3, rngs=rngs), lambda size, rngs: ShiftedWindows(size, 2, 2, True, rngs=rngs),
              lambda size, rngs: DepthwiseConv(size, 3, rngs=rngs)]
    model = TinyGrid(1, 8, [mixers, [mixers[0]]], 3, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 12, 1)), jnp.float32)
    slopes = nnx.jit(nnx.grad(lambda model: (model(x) ** 2).sum()))(model)
    assert all(jnp.abs(slope).max() > 0 for slope in jax.tree.leaves(slopes))
    window = nnx.jit(ShiftedWindows(8, 2, 4, True, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 8)), jnp.float32)
    moved = jnp.abs(window(x.at[:, 0, 0].set(3.0)) - window(x)).max((0, 3)) > 0
    assert moved[:2, :2].all() and moved.sum() == 4
