"""The paper: with keys freed of their mean, int8 products of queries and keys change the outputs of trained models so little that no task notices, less than
8-bit floating point does, at about 2.1 times the rate of FlashAttention-2.

Here: all 30 layers of SmolLM2 read 1024 tokens of docstrings, all 6 of MiniLM 512 (needs `attnx fetch smollm2-135m` and `minilm-l6`). Each layer's queries, keys and
values are given to attention in float32 and to attention whose queries and keys are rounded: to int8 at a scale for 128 queries and for 64 keys, at a scale a token, to
float8 (e4m3) at a scale a block; with keys as they are and less their mean; also with values and weights in int8. Outputs are compared by cosine similarity,
relative L1 distance and root mean square error. And SmolLM2 predicts 512 tokens, of docstrings and of Python source, with the attention of all layers replaced.
Rates are not measured.
The claim holds if smoothing reduces the mean relative L1 distance of int8 in both models, the worst of all layers has a cosine of at least 0.995 with it, nats a
token change by at most 0.01 on both texts, and int8 has a smaller mean L1 distance than float8, both smoothed.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import attnx
from attnx import masks, products
from attnx.products import sage_attention
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import COLOURS
from experiments.tasks import captured
from pallas_kernels.quantised import formats


def _float8(query, key, value, *, is_causal, smooth_k, implementation=None):
    """As SageAttention, in e4m3."""
    key = formats.smooth_k(key)[0] if smooth_k else key
    return attnx.attention(query, key, value, mask=masks.causal() if is_causal else None, products=products.float8("block"), implementation=implementation)


BLOCK, SMOOTH = "int8, block", "int8, block, smoothed"
E4M3 = "e4m3, block, smoothed"
ARMS = {
    BLOCK: partial(sage_attention, smooth_k=False),
    SMOOTH: partial(sage_attention, smooth_k=True),
    "int8, token": partial(sage_attention, scores="token", smooth_k=False),
    "int8, token, smoothed": partial(sage_attention, scores="token", smooth_k=True),
    "e4m3, block": partial(_float8, smooth_k=False),
    E4M3: partial(_float8, smooth_k=True),
    "int8, block, smoothed, values too": partial(sage_attention, smooth_k=True, values="int8"),
}
READERS = BLOCK, SMOOTH, E4M3
MODELS = {"SmolLM2": ("smollm2-135m", 1024, True), "MiniLM": ("minilm-l6", 512, False)}


def _compare(qkv, is_causal):
    """The errors of all arms in all layers, and how far keys stand out: the largest over the standard deviation."""
    def layer(qkv):
        exact = attnx.attention(*qkv, mask=masks.causal() if is_causal else None)
        errors = {name: formats.error_metrics(attend(*qkv, is_causal=is_causal), exact) for name, attend in ARMS.items()}
        return errors, jnp.abs(qkv[1]).max() / qkv[1].std()

    return jax.lax.map(layer, tuple(qkv))


def run(trial: Trial):
    """Compares outputs layer by layer, then the predictions of whole models."""
    measured = {}
    for index, (model, (name, length, is_causal)) in enumerate(MODELS.items()):
        qkv = captured.qkv(name, trial.seed, trial.scaled(length, 64))
        if trial.smoke:
            qkv = [x[:2] for x in qkv]
        errors, outliers = jax.jit(partial(_compare, is_causal=is_causal))(qkv)
        for arm, found in errors.items():
            measured |= {f"{model}, {arm}, l1": found["l1"].mean(), f"{model}, {arm}, rmse": found["rmse"].mean(), f"{model}, {arm}, cosines": found["cosine"],
                         f"{model}, {arm}, worst": found["cosine"].min()}
        measured[f"{model}, outliers"] = outliers
        trial.report(0.2 * (index + 1), model)
    for kind in captured.TEXTS:
        own = captured.nats(None, trial.seed, trial.scaled(512, 32), kind)
        measured[f"{kind}, exact"] = own
        for index, arm in enumerate(READERS):
            nats = captured.nats(partial(ARMS[arm], is_causal=True), trial.seed, trial.scaled(512, 32), kind)
            measured |= {f"{kind}, {arm}": nats, f"{kind}, {arm}, change": nats - own}
            trial.report(0.4 + 0.3 * (kind != captured.TEXTS[0]) + 0.3 * (index + 1) / len(READERS), kind)
    return measured


def draw(figure, seeds):
    """Cosines by layer, and how far the keys of layers stand out."""
    panels = figure.subplots(2, 2, width_ratios=(3, 1), sharex="col")
    for (top, bottom), model in zip(panels.T, MODELS):
        for index, arm in enumerate((BLOCK, SMOOTH, E4M3, "int8, block, smoothed, values too")):
            lost = 1 - np.array([seed[f"{model}, {arm}, cosines"] for seed in seeds], float)
            top.semilogy(lost.mean(0), color=COLOURS[index], marker=".", label=arm)
            top.fill_between(range(lost.shape[1]), lost.min(0), lost.max(0), color=COLOURS[index], alpha=0.15, linewidth=0)
        bottom.plot(np.mean([seed[f"{model}, outliers"] for seed in seeds], 0), "k.-")
        bottom.set_xlabel(f"layer of {model}")
        for axes in (top, bottom):
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].axhline(0.005, color="#999999", linestyle=":")
    panels[0, 0].set_ylabel("1 - cosine")
    panels[0, 0].legend(frameon=False, fontsize=7)
    panels[1, 0].set_ylabel("max |k| / std k")


def _gain(model, before, after):
    return lambda m: m[f"{model}, {before}, l1"] - m[f"{model}, {after}, l1"]


claim = Claim(
    id="sage-attention",
    run=run,
    criteria=(
        *(Criterion(f"relative L1 distance of int8 by blocks: less with smoothed keys, {model}", _gain(model, BLOCK, SMOOTH)) for model in MODELS),
        Criterion("worst layer's cosine at least 0.995 with smoothed keys", lambda m: min(m[f"{model}, {SMOOTH}, worst"] for model in MODELS) - 0.995),
        Criterion("nats a token change by at most 0.01 with smoothed keys, on both texts",
                  lambda m: 0.01 - max(abs(m[f"{kind}, {SMOOTH}, change"]) for kind in captured.TEXTS)),
        *(Criterion(f"relative L1 distance, keys smoothed: less in int8 than in e4m3, {model}", _gain(model, E4M3, SMOOTH)) for model in MODELS)),
    table=(("", *(f"{model}: {what}" for model in MODELS for what in ("L1", "RMSE", "worst cosine")), *(f"nats, {kind}" for kind in captured.TEXTS)),
           {**{arm: (*(f"{model}, {arm}, {what}" for model in MODELS for what in ("l1", "rmse", "worst")),
                     *(f"{kind}, {arm}" if arm in READERS else "" for kind in captured.TEXTS)) for arm in ARMS},
            "exact": (*[""] * 6, *(f"{kind}, exact" for kind in captured.TEXTS))}),
    draw=draw)
