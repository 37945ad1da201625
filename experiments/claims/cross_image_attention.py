"""The paper: attending to the keys and values of another picture transfers its looks without training, across shapes, sizes and views; contrast, guidance and
AdaIN make it clean. It is preferred to other methods by users.

Here: a denoiser of pictures of two shapes is given, trained on all shapes and colours. 48 pictures of two red squares (the structure) are each painted
like a picture of a blue disc and a green cross (the appearance), places and sizes drawn at random. Both are inverted without words, by deterministic steps, to the
noise of step 8 of 25; from there output, appearance and structure are denoised together, the last two along their inverted paths. The output's self-attention in the
second and third of three blocks looks across with the paper's schedule (scaled to 25 steps), guidance (3.5 to 1.75) and contrast (1.67). Compared
are no swap, the swap alone, with contrast, with contrast and AdaIN inside the objects (whose masks are known), and AdaIN of the pixels. Measured are, where
the structure has its objects, the mean distance of a pixel to the nearer of the appearance's colours (channels from -1 to 1), and how far the output's objects overlap
the structure's. The claim holds if swap and contrast bring the colours nearer than no swap and cost less than 0.1 of overlap.

Besides, reported only: one attention layer without training on photographs, from a crop of a temple to one of a flower, 96 by 96 pixels in patches of 4 by 4. Queries
and keys are the patches, each channel of a photograph with mean 0 and deviation 1, of length 6; values are the patches themselves, and a crop is put together from what
its patches find. Measured are how far its colours (mean and deviation of each channel, from 0 to 1) are from the flower's, and how its brightness correlates with the
temple's.

A first denoiser, with position vectors, was given up after a trial of three pictures, in which the swap copied the appearance's layout as well (overlap 0.28); in the one
used here convolutions carry the layout, as in the networks that the paper steers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import attnx
from attnx.core.moments import adain
from attnx.steering import APPEARANCE, OUTPUT, CrossImageSchedule, contrast_softmax, cross_image_hooks, cross_image_qkv, swap_guidance
from experiments.denoiser import GRID, STEPS, ddim, load, predictor, times
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.tasks import photos, shapes

SCENES, LAYERS = 48, (1, 2)
SCHEDULE = CrossImageSchedule(swap=((GRID, (10, 70)),)).scaled(STEPS)
ARMS = {"no swap": (0.0, 1.0, False), "swap": (1.0, 1.0, False), "swap, contrast": (1.0, 1.67, False), "swap, contrast, AdaIN": (1.0, 1.67, True)}
"""Share of the guidance, contrast, and whether colours are normalised."""
PIXELS = "AdaIN of pixels"
PHOTOS = {"no swap": (OUTPUT, 1.0), "swap": (APPEARANCE, 1.0), "swap, contrast": (APPEARANCE, 1.67)}
"""Whose patches, and contrast."""
CROP, PATCH, LENGTH = 96, 4, 6.0


def pictures(seed: int, count: int):
    """Appearances and structures, each [count, 12, 12, 3]."""
    drawn = shapes.scenes(jax.random.key(seed), 2 * count)
    looks = shapes.scene(("blue", "disc"), ("green", "cross")), shapes.scene(("red", "square"), ("red", "square"))
    colour, kind = (jnp.repeat(jnp.stack([getattr(look, name) for look in looks]), count, axis=0) for name in ("colour", "kind"))
    return tuple(jnp.split(shapes.render(drawn._replace(colour=colour, kind=kind)), 2))


@jax.jit
def transfer(appearance, structure, share, contrast, normalised):
    """One picture [12, 12, 3], painted like another."""
    apply, words = load(), jnp.asarray(jnp.stack([shapes.NOTHING] * 3))
    clock = times()[SCHEDULE.skip:]
    paths = ddim(predictor(apply, words[:2]), jnp.stack([appearance, structure]), clock[::-1])[::-1]

    def predict(x, time, index):
        plain, swapped = (predictor(apply, words, hooks=hooks)(x, time, index) for hooks in (None, functools.partial(
            cross_image_hooks, layers=LAYERS, schedule=SCHEDULE, contrast=contrast)))
        return swap_guidance(plain, swapped, share * SCHEDULE.guidance(index))

    def adjust(x, index):
        painted = adain(x[OUTPUT], paths[index, 0], mask=shapes.objects(structure), reference_mask=shapes.objects(appearance))
        painted = jnp.where(normalised & SCHEDULE.normalises(index - 1), painted, x[OUTPUT])
        return jnp.concatenate([painted[None], paths[index]])

    return ddim(predict, jnp.concatenate([paths[0, 1:], paths[0]]), clock, adjust)[-1, OUTPUT]


def painted(appearance, structure):
    """What each arm makes of the pictures: {arm: [count, 12, 12, 3]}."""
    made = {name: jax.vmap(transfer, (0, 0, None, None, None))(appearance, structure, *arm) for name, arm in ARMS.items()}
    return made | {PIXELS: adain(structure, appearance, mask=shapes.objects(structure), reference_mask=shapes.objects(appearance))}


def photographs(seed: int):
    """A temple, a flower, and the temple of the flower's patches in all ways: {name: [96, 96, 3]}."""
    corners = np.random.default_rng(seed).integers(0, np.array([213, 320]) - CROP, (2, 2))
    temple, flower = (image[row:row + CROP, column:column + CROP] for image, (row, column) in zip(photos.images(), corners))
    count = CROP // PATCH
    cut = lambda x: x.reshape(count, PATCH, count, PATCH, 3).swapaxes(1, 2).reshape(1, count**2, 1, -1)
    unit = lambda x: x * LENGTH / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    patches = jnp.concatenate([cut(x) for x in (temple, flower, temple)])
    looks = unit(jnp.concatenate([cut((x - x.mean((0, 1))) / x.std((0, 1))) for x in (temple, flower, temple)]))
    made = {"temple": temple, "flower": flower}
    for name, (source, contrast) in PHOTOS.items():
        query, key, value = cross_image_qkv(looks, looks, patches, source)
        out = attnx.attention(query[:1], key[:1], value[:1], scale=1.0, weights=contrast_softmax(contrast))
        made[name] = out.reshape(count, count, PATCH, PATCH, 3).swapaxes(1, 2).reshape(CROP, CROP, 3)
    return made


def _colours(image):
    return jnp.concatenate([image.mean((0, 1)), image.std((0, 1))])


def run(trial: Trial):
    """Paints the pictures in all ways."""
    appearance, structure = pictures(trial.seed, trial.scaled(SCENES))
    where = shapes.objects(structure)
    wanted = shapes.PALETTE[[shapes.COLOURS.index("blue"), shapes.COLOURS.index("green")]]
    measured = {}
    for name, picture in painted(appearance, structure).items():
        distance = jnp.min(jnp.linalg.norm(picture[..., None, :] - wanted, axis=-1), axis=-1)
        measured[f"{name}, colour"] = jnp.mean(distance, where=where)
        measured[f"{name}, overlap"] = shapes.iou(shapes.objects(picture), where).mean()
        trial.report(len(measured) / (2 * len(ARMS) + 2), name)
    made = photographs(trial.seed)
    for name in PHOTOS:
        measured[f"{name}, photograph"] = jnp.linalg.norm(_colours(made[name]) - _colours(made["flower"]))
        measured[f"{name}, brightness"] = jnp.corrcoef(made[name].mean(-1).ravel(), made["temple"].mean(-1).ravel())[0, 1]
    return measured


def draw(figure, seeds):
    """Both measures, and pictures of the first seed."""
    names = (*ARMS, PIXELS)
    top, bottom, last = figure.subfigures(3, 1)
    for axes, what in zip(top.subplots(1, 2), ("colour", "overlap")):
        bars(axes, {name: [seed[f"{name}, {what}"] for seed in seeds] for name in names}, {"colour": "distance to colours", "overlap": "overlap of objects"}[what])
    appearance, structure = pictures(0, 4)
    rows = {"structure": structure, "appearance": appearance} | painted(appearance, structure)
    for axes, (name, row) in zip(bottom.subplots(1, len(rows)), rows.items()):
        grid = np.pad((np.clip(row, -1, 1) + 1) / 2, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=1).reshape(2, 2, 13, 13, 3)
        axes.imshow(grid.swapaxes(1, 2).reshape(26, 26, 3))
        axes.set_title(name.replace(", ", ",\n"), fontsize=8)
        axes.axis("off")
    made = photographs(0)
    for axes, (name, picture) in zip(last.subplots(1, len(made)), made.items()):
        axes.imshow(np.clip(picture, 0, 1))
        axes.set_title(name, fontsize=8)
        axes.axis("off")


claim = Claim(
    id="cross-image-attention",
    run=run,
    criteria=(
        Criterion("distance to the appearance's colours: swap and contrast below no swap", lambda m: m["no swap, colour"] - m["swap, contrast, colour"]),
        Criterion("overlap with the structure's objects: swap and contrast less than 0.1 below no swap",
                  lambda m: 0.1 - (m["no swap, overlap"] - m["swap, contrast, overlap"]))),
    table=(("", "distance to colours", "overlap of objects", "photograph, colours", "photograph, brightness"),
           {name: (f"{name}, colour", f"{name}, overlap", *((f"{name}, photograph", f"{name}, brightness") if name in PHOTOS else ("", "")))
            for name in (*ARMS, PIXELS)}),
    draw=draw)
