"""Orders of a grid: permutations, with the neighbours that each promises, and exact inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core.orders import inverse_order, permute, token_order

NAMES = ["raster", "transposed", "snake", "zigzag", "morton", "hilbert"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 5), (3, 5), (8, 8), (2, 3, 4), (4, 4, 4)])
def test_orders_are_permutations(name, shape):
    order = token_order(shape, name)
    assert order.dtype == np.int32 and sorted(order) == list(range(np.prod(shape)))
    assert (order[inverse_order(order)] == np.arange(order.size)).all()


@pytest.mark.parametrize("name, shape", [("snake", (3, 5)), ("snake", (3, 4, 5)), ("hilbert", (2, 2)), ("hilbert", (16, 16)),
                                         ("hilbert", (8, 8, 8))])
def test_consecutive_positions_are_neighbours(name, shape):
    walk = np.stack(np.unravel_index(token_order(shape, name), shape), -1)
    assert (abs(np.diff(walk, axis=0)).sum(-1) == 1).all()


@pytest.mark.parametrize("name", ["morton", "hilbert"])
def test_blocks_are_visited_whole(name):
    walk = np.stack(np.unravel_index(token_order((8, 8), name), (8, 8)), -1)
    for side in (2, 4):
        for block in (walk // side).reshape(-1, side * side, 2):
            assert (block == block[0]).all()


def test_orders_by_hand():
    grid = np.arange(12).reshape(3, 4)
    assert token_order((3, 4)).tolist() == list(range(12))
    assert token_order((3, 4), "transposed").tolist() == grid.T.ravel().tolist()
    assert token_order((3, 4), "snake").tolist() == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]
    assert token_order((3, 4), "zigzag").tolist() == [0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11]  # the coefficients of JPEG, cropped
    assert token_order((4, 4), "morton").tolist()[:8] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_curves_of_rectangles_skip_what_lies_outside():
    walk = zip(*np.unravel_index(token_order((8, 8), "hilbert"), (8, 8)))
    assert token_order((3, 6), "hilbert").tolist() == [6 * i + j for i, j in walk if i < 3 and j < 6]


@pytest.mark.parametrize("axis", [1, -2])
def test_permute_and_back(axis):
    x = jax.random.normal(jax.random.key(0), (2, 12, 3))
    orders = [token_order((3, 4), "hilbert"), jax.random.permutation(jax.random.key(1), 12)]

    @jax.jit
    def there_and_back(x, order):
        y = permute(x, order, axis=axis)
        gradient = jax.grad(lambda x: jnp.sum(permute(x, order, axis=axis) * y))(x)
        return y, permute(y, inverse_order(order), axis=axis), gradient

    for order in orders:
        y, back, gradient = there_and_back(x, order)
        np.testing.assert_array_equal(y, np.asarray(x)[:, np.asarray(order)])
        np.testing.assert_array_equal(back, x)
        np.testing.assert_array_equal(gradient, x)


def test_empty_grid():
    assert all(token_order((0, 3), name).shape == (0,) for name in NAMES)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="order: expected one of .*'hilbert'.*, got 'peano'"):
        token_order((2, 2), "peano")
    with pytest.raises(ValueError, match=r"order: expected shape \[T\] with T = 4"):
        permute(jnp.ones((1, 4)), np.arange(3))
