"""The pictures of shapes, and the denoiser of them that comes with the package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import denoiser
from experiments.tasks import shapes


def test_recognised():
    """What is drawn is recognised, through noise too; words say what it is; masks are where it is."""
    scene = shapes.scenes(jax.random.key(0), 256)
    pictures = shapes.render(scene)
    noisy = pictures + 0.2 * jax.random.normal(jax.random.key(1), pictures.shape)
    colour, kind = jax.jit(shapes.hits)(noisy, scene)
    assert colour.mean() > 0.99 and kind.mean() > 0.98
    words = shapes.prompt(scene)[0]
    assert [shapes.WORDS[i] for i in words] == [shapes.COLOURS[scene.colour[0, 0]], shapes.KINDS[scene.kind[0, 0]],
                                                shapes.COLOURS[scene.colour[0, 1]], shapes.KINDS[scene.kind[0, 1]]]
    mask = shapes.objects(pictures)
    np.testing.assert_array_equal(shapes.halves(mask).any(-3), mask)
    assert (shapes.iou(shapes.halves(mask), shapes.coverage(scene) > 0.5) == 1).all()
    inside = shapes.coverage(scene)[:, 0] > 0.99  # empty for some crosses, which are thin
    expected = np.where(inside.any((1, 2))[:, None], shapes.PALETTE[scene.colour[:, 0]], shapes.GREY)
    np.testing.assert_allclose(shapes.mean_colour(pictures, inside), expected, atol=1e-2)
    np.testing.assert_allclose(shapes.psnr(pictures, pictures + 0.02), 40, atol=1e-2)


def test_prompts_dropped():
    """A share of the prompts says nothing."""
    _, words = shapes.sampler(1000, dropped=0.3)(jax.random.key(0))
    assert 0.2 < (words == 0).all(-1).mean() < 0.4 and ((words == 0).all(-1) == (words == 0).any(-1)).all()


def test_patches():
    """Pictures are found again from their tokens, which are row by row."""
    pictures = jnp.arange(2 * 12 * 12 * 3.0).reshape(2, 12, 12, 3)
    tokens = denoiser.patches(pictures)
    np.testing.assert_array_equal(denoiser.unpatch(tokens), pictures)
    np.testing.assert_array_equal(tokens[0, 7].reshape(2, 2, 3), pictures[0, 2:4, 2:4])


def test_neighbours():
    """A linear map of neighbours is a convolution."""
    x, kernel = jax.random.normal(jax.random.key(0), (2, 36, 4)), jax.random.normal(jax.random.key(1), (3, 3, 4, 5))
    expected = jax.lax.conv_general_dilated(x.reshape(2, 6, 6, 4), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(denoiser.neighbours(x) @ kernel.reshape(36, 5), expected.reshape(2, 36, 5), atol=1e-4)


@pytest.fixture(scope="module")
def given():
    """The model that comes with the package."""
    return denoiser.load()


def test_samples(given):
    """What it paints is what the prompt says; hooks reach its three layers."""
    scene = shapes.scenes(jax.random.key(0), 24)
    words, noise = shapes.prompt(scene), jax.random.normal(jax.random.key(1), (24, 12, 12, 3))
    paint = jax.jit(lambda noise: denoiser.ddim(denoiser.predictor(given, words, guidance=2.0), noise, denoiser.times(12))[-1])
    colour, kind = shapes.hits(paint(noise), scene)
    assert colour.mean() > 0.95 and kind.mean() > 0.85
    seen = []
    for stage in ("qkv", "cross_weights"):
        given(noise[:1], jnp.ones(1), words[:1], hooks={stage: lambda value, layer, at: (seen.append(jax.tree.map(jnp.shape, value)), value)[1]})
    assert seen[0] == ((1, 36, 4, 16),) * 3 and seen[-1] == (1, 4, 36, 4)


def test_inversion(given):
    """Pictures are found again from the noise that they are inverted to."""
    scene = shapes.scenes(jax.random.key(2), 8)
    pictures, predict = shapes.render(scene), denoiser.predictor(given, shapes.prompt(scene))

    @jax.jit
    def there_and_back(pictures):
        path = denoiser.ddim(predict, pictures, denoiser.times()[::-1])
        return path, denoiser.ddim(predict, path[-1], denoiser.times())

    path, back = there_and_back(pictures)
    np.testing.assert_array_equal(path[0], pictures)
    assert path.shape == (26, 8, 12, 12, 3) and shapes.psnr(back[-1], pictures).mean() > 28
    assert shapes.psnr(path[-1], pictures).mean() < 15


def test_saved(given, tmp_path):
    """Weights of another model are refused."""
    np.savez_compressed(tmp_path / "other.npz", *(np.zeros(3, np.float16) for _ in range(60)))
    with pytest.raises(ValueError, match="expected the weights of this model"):
        denoiser.load(tmp_path / "other.npz")
    assert denoiser.FILE.stat().st_size < 1_000_000
