import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.positions import Rotary, learned, rotary, sinusoidal


def rotary_by_matrices(x, positions, base, size, interleaved):
    """The definition: a 2x2 rotation matrix for each channel pair, in float64."""
    x = np.asarray(x, np.float64)
    out = x.copy()
    for m in range(size // 2):
        i, j = (2 * m, 2 * m + 1) if interleaved else (m, m + size // 2)
        angle = positions[..., None] * base ** (-2 * m / size)  # [B, T, 1]
        out[..., i] = np.cos(angle) * x[..., i] - np.sin(angle) * x[..., j]
        out[..., j] = np.sin(angle) * x[..., i] + np.cos(angle) * x[..., j]
    return out


@pytest.mark.parametrize("size, interleaved, base", [(8, False, 1e4), (8, True, 1e4), (4, False, 50.0), (4, True, 50.0)])
def test_rotary_is_the_rotation_matrix(size, interleaved, base):
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 100, 3, -1, 0]])
    out = jax.jit(lambda x, p: rotary(x, p, base=base, rotary_size=size, interleaved=interleaved))(x, jnp.array(positions))
    np.testing.assert_allclose(out, rotary_by_matrices(x, positions, base, size, interleaved), atol=1e-5)
    assert (out[..., size:] == x[..., size:]).all()


def test_rotary_scores_depend_on_differences_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 4, 2, 8))
    scores = [jnp.einsum("btnh,bsnh->bnts", *Rotary()(query, key, at, at)) for at in (jnp.arange(4), jnp.arange(4) + 50)]
    np.testing.assert_allclose(*scores, atol=1e-4)
    unmoved = jnp.einsum("btnh,bsnh->bnts", query, key)
    assert abs(scores[0] - unmoved).max() > 0.1


def test_rotary_defaults_dtypes_and_empty():
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 6), jnp.bfloat16)
    plain, given, still, empty, half, two = jax.jit(lambda x: (
        rotary(x), rotary(x, jnp.arange(4)), rotary(x, rotary_size=0), rotary(x[:, :0]), Rotary(fraction=0.5)(x, x)[0],
        rotary(x, rotary_size=2)))(x)
    assert plain.dtype == jnp.bfloat16 and (plain == given).all() and (plain != x).any()
    assert (still == x).all() and empty.shape == (1, 0, 2, 6) and (half == two).all()
    with jax.enable_x64(True):
        wide = rotary(jnp.ones((1, 3, 1, 4), jnp.float64), jnp.array([0, 1, 10**6]))
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide[0, 2, 0, 0], np.cos(1e6) - np.sin(1e6), atol=1e-9)


def test_rotary_gradient_is_the_inverse_rotation():
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    out, pull = jax.vjp(rotary, x)
    np.testing.assert_allclose(pull(out)[0], x, atol=1e-5)


@pytest.mark.parametrize("call, named", [
    (lambda x: rotary(x[0]), "x: expected shape"),
    (lambda x: rotary(x, rotary_size=3), "rotary_size"),
    (lambda x: rotary(x, rotary_size=10), "rotary_size"),
    (lambda x: rotary(x, jnp.arange(3)), "positions: expected shape"),
    (lambda x: sinusoidal(jnp.arange(3), 5), "features"),
])
def test_wrong_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call(jnp.ones((1, 4, 2, 8)))


def test_sinusoidal_interleaves_and_shifts_linearly():
    table = np.asarray(sinusoidal(jnp.arange(12), 8), np.float64)
    angle = np.arange(12)[:, None] * 1e4 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(table[:, 0::2], np.sin(angle), atol=1e-6)
    np.testing.assert_allclose(table[:, 1::2], np.cos(angle), atol=1e-6)
    shift, residual, rank, _ = np.linalg.lstsq(table[:9], table[3:], rcond=None)
    assert rank == 8
    np.testing.assert_allclose(table[:9] @ shift, table[3:], atol=1e-5)


def test_learned_reads_rows_and_marks_what_it_cannot_tell():
    table = jax.random.normal(jax.random.key(0), (4, 3))
    out = learned(jnp.array([[3, 0, -1, 4]]), table)
    assert (out[0, 0] == table[3]).all() and (out[0, 1] == table[0]).all() and (out[0, 2] == 0).all()
    assert jnp.isnan(out[0, 3]).all()
    gradient = jax.grad(lambda t: learned(jnp.array([3, 3, -1]), t).sum())(table)
    np.testing.assert_array_equal(gradient, np.array([0, 0, 0, 2.0])[:, None] * np.ones(3))
