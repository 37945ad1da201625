"""Pictures of two shapes, and words that say what they are: the task on which steering of an image model is measured.

A picture is 12 x 12 pixels of three channels in [-1, 1]. The left and the right half hold a shape each - square, disc or cross, in one of six colours -
on grey. Its prompt is four words: colour and shape on the left, colour and shape on the right. Position and size vary and are not told.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SIDE, GREY = 12, 0.0
KINDS = ("square", "disc", "cross")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
PALETTE = 0.8 * np.array([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]], np.float32)
WORDS = ("", *COLOURS, *KINDS)
"""The vocabulary; word 0 says nothing."""
NOTHING = np.zeros(4, np.int32)
"""The prompt that says nothing."""


class Scene(NamedTuple):
    """What a picture shows, the shape on the left first; leading axes are of batches.

    Attributes:
      colour: int32 [..., 2], of :data:`COLOURS`.
      kind: int32 [..., 2], of :data:`KINDS`.
      centre: [..., 2, 2], row and column of each in pixels.
      radius: [..., 2], half its height in pixels.
    """

    colour: Int[Array, "*B 2"]
    kind: Int[Array, "*B 2"]
    centre: Float[Array, "*B 2 2"]
    radius: Float[Array, "*B 2"]


def scenes(key: Array, batch: int) -> Scene:
    """Scenes drawn at random."""
    colour, kind, row, column, radius = jax.random.split(key, 5)
    row = jax.random.uniform(row, (batch, 2), minval=3.0, maxval=9.0)
    column = jax.random.uniform(column, (batch, 2), minval=2.7, maxval=3.3) + jnp.array([0, SIDE / 2])
    return Scene(jax.random.randint(colour, (batch, 2), 0, len(COLOURS)), jax.random.randint(kind, (batch, 2), 0, len(KINDS)),
                 jnp.stack([row, column], -1), jax.random.uniform(radius, (batch, 2), minval=2.1, maxval=2.7))


def scene(left: tuple[str, str], right: tuple[str, str], rows: tuple[float, float] = (6.0, 6.0), radius: float = 2.4) -> Scene:
    """A scene in words.

    >>> scene(("red", "square"), ("blue", "disc")).colour
    Array([0, 2], dtype=int32)
    """
    colour, kind = ([words.index(half[i]) for half in (left, right)] for i, words in enumerate((COLOURS, KINDS)))
    return Scene(jnp.array(colour, jnp.int32), jnp.array(kind, jnp.int32), jnp.array([[rows[0], SIDE / 4], [rows[1], 3 * SIDE / 4]], jnp.float32),
                 jnp.full(2, radius, jnp.float32))


def prompt(scene: Scene) -> Int[Array, "*B 4"]:
    """Its four words, as indices of :data:`WORDS`."""
    words = jnp.stack([1 + scene.colour, 1 + len(COLOURS) + scene.kind], axis=-1)
    return words.reshape(*words.shape[:-2], 4)


def coverage(scene: Scene, side: int = SIDE) -> Float[Array, "*B 2 side side"]:
    """The share of each pixel that each shape covers."""
    y, x = (jnp.arange(side) + 0.5 - scene.centre[..., i, None] for i in range(2))
    y, x, r = jnp.abs(y)[..., :, None], jnp.abs(x)[..., None, :], scene.radius[..., None, None]
    arm = 0.36 * r
    inside = [jnp.minimum(0.9 * r - y, 0.9 * r - x), r - jnp.hypot(y, x), jnp.maximum(jnp.minimum(r - y, arm - x), jnp.minimum(arm - y, r - x))]
    distance = jnp.select([(scene.kind == i)[..., None, None] for i in range(len(KINDS))], inside)
    return jnp.clip(distance + 0.5, 0, 1)


def compose(coverage: Float[Array, "*B n h w"], colours: Float[Array, "*B n 3"]) -> Float[Array, "*B h w 3"]:
    """Colours (or [..., n, h, w, 3], textures) laid over grey where they cover it."""
    colours = colours if colours.ndim == coverage.ndim + 1 else colours[..., None, None, :]
    return GREY + jnp.sum(coverage[..., None] * (colours - GREY), axis=-4)


def render(scene: Scene) -> Float[Array, "*B 12 12 3"]:
    """The picture of a scene."""
    return compose(coverage(scene), jnp.take(PALETTE, scene.colour, axis=0))


def sampler(batch: int, dropped: float = 0.1) -> Callable:
    """``sample(key) -> (pictures [batch, 12, 12, 3], prompts [batch, 4])``; a share of the prompts says nothing."""
    def sample(key):
        key, drop = jax.random.split(key)
        drawn = scenes(key, batch)
        kept = jax.random.uniform(drop, (batch, 1)) >= dropped
        return render(drawn), jnp.where(kept, prompt(drawn), NOTHING)

    return sample


def objects(pictures: Float[Array, "*B h w 3"], threshold: float = 0.4) -> Array:
    """Where a picture is not grey: boolean [..., h, w]."""
    return jnp.max(jnp.abs(pictures - GREY), axis=-1) > threshold


def halves(mask: Array) -> Array:
    """A mask [..., h, w] as two, of what it has in the left and in the right half: [..., 2, h, w]."""
    left = jnp.arange(mask.shape[-1]) < mask.shape[-1] // 2
    return jnp.stack([mask & left, mask & ~left], axis=-3)


def iou(a: Array, b: Array) -> Float[Array, "*B"]:
    """Intersection over union of boolean masks [..., h, w]; 1 where both are empty."""
    both, either = (jnp.sum(x, axis=(-2, -1)) for x in (a & b, a | b))
    return jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0)


def mean_colour(pictures: Float[Array, "*B h w 3"], mask: Array) -> Float[Array, "*B 3"]:
    """The mean colour inside a boolean mask [..., h, w]; grey where it is empty."""
    total = jnp.sum(jnp.where(mask[..., None], pictures, 0), axis=(-3, -2))
    return jnp.where(jnp.any(mask, axis=(-2, -1))[..., None], total / jnp.maximum(jnp.sum(mask, axis=(-2, -1)), 1)[..., None], GREY)


def psnr(a: Array, b: Array) -> Float[Array, "*B"]:
    """Peak signal-to-noise ratio of pictures [..., h, w, 3], in dB."""
    return 10 * jnp.log10(4 / jnp.maximum(jnp.mean(jnp.square(a - b), axis=(-3, -2, -1)), 1e-10))


_GRID = np.linspace(3.0, 9.0, 13), np.array([2.7, 3.0, 3.3]), np.array([2.1, 2.4, 2.7])


def recognise(pictures: Float[Array, "*B 12 12 3"]) -> tuple[Int[Array, "*B 2"], Int[Array, "*B 2"]]:
    """What each half shows: ``(colours [..., 2], kinds [..., 2])``, those of the scene on a grid of places and sizes whose picture is nearest."""
    kind, row, column, radius = (x.reshape(-1) for x in np.meshgrid(np.arange(len(KINDS)), *_GRID, indexing="ij"))
    found = []
    for half in range(2):
        pixels = pictures[..., :, half * SIDE // 2:(half + 1) * SIDE // 2, :]
        pixels = pixels.reshape(*pixels.shape[:-3], -1, 3) - GREY
        shapes = coverage(Scene(None, kind, jnp.stack([row, column], -1), jnp.asarray(radius)))[..., :SIDE // 2].reshape(kind.size, -1)
        # |pixels - shape colour|^2 without the pixels' own square: [..., shapes, colours]
        product = jnp.einsum("...pc,sp,kc->...sk", pixels, shapes, PALETTE - GREY)
        distance = jnp.sum(shapes**2, -1)[:, None] * jnp.sum((PALETTE - GREY)**2, -1) - 2 * product
        best = jnp.argmin(distance.reshape(*distance.shape[:-2], -1), axis=-1)
        found.append((best % len(COLOURS), jnp.take(kind, best // len(COLOURS))))
    return tuple(jnp.stack(x, axis=-1) for x in zip(*found))


def hits(pictures: Float[Array, "*B 12 12 3"], scene: Scene) -> tuple[Array, Array]:
    """Whether each half shows the colour and the kind of shape that it should: two boolean arrays [..., 2]."""
    colour, kind = recognise(pictures)
    return colour == scene.colour, kind == scene.kind
