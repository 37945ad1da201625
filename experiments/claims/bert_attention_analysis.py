"""The paper: single heads of BERT find syntactic relations, direct objects (87%) and determiners (94%) among them, far better than fixed offsets do; heads of one
layer behave alike; much attention goes to [SEP]; and a probe of all attention maps and words finds 77% of heads (figures as in the paper's text).

Here: the 6 x 12 heads of a pretrained BERT-style encoder, MiniLM (trained to embed sentences, no longer to fill in words), read 400 sentences of a small
grammar with known trees. Half of them choose the best head and direction, and the best offset from -3 to 2, for each relation, and train the probes; the other
half tests. Probes read all maps; or all maps and the words' input embeddings; or, without attention, the embeddings and distances. They see 1000 batches of 8, with the
paper's rate of 0.002 for Adam, but 0.02 for that of the maps, whose 146 numbers have to grow in a fortieth of the steps. The claim holds if the relation that
gains most over its offset by the first half gains more than 15 points by the second, heads of one layer are nearer to each other (Jensen-Shannon)
than to those of other layers, and the probe of the maps finds more heads of words than the best single attention head does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attnx import analysis, pretrained
from attnx.analysis.bert_heads import MODES
from attnx.nn import record
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit, functional
from experiments.tasks import grammar

SENTENCES, OFFSETS, ROOT = 400, range(-3, 3), 0
RATES = {"maps": 2e-2, "maps and words": 2e-3, "words and distances": 2e-3}
PROBES = tuple(RATES)


@functools.cache
def _model():
    return pretrained.load("minilm-l6")


@functools.partial(jax.jit, static_argnums=(0, 5))
def _read(graph, params, tokens, positions, word_of, words):
    _, maps = record(nnx.merge(graph, params), tokens, positions)
    return analysis.token_to_word(maps, word_of[:, None], words)


def read(sentences):
    """What the model makes of sentences, by word, [CLS] first and [SEP] after the last.

    Returns:
      A dict: maps [L, N, B, W, W], heads and relations int32 [B, W], words [B, W] (booleans), stop [B] and vectors [B, W, D].
    """
    model = _model()
    texts = [" ".join(sentence.words) for sentence in sentences]
    tokens, positions = model.encode(texts)
    word_of = np.full(tokens.shape, -1, np.int32)
    for row, encoding, sentence in zip(word_of, model.tokenizer.encode_batch(texts), sentences):
        ids = [0, *(1 + word for word in encoding.word_ids if word is not None), 1 + len(sentence.words)]
        if len(ids) != len(encoding.ids) or ids[-2] != len(sentence.words):
            raise ValueError(f"{sentence.words}: split into other words by the tokenizer")
        row[:len(ids)] = ids
    size = 2 + max(len(sentence.words) for sentence in sentences)
    heads, relations = np.full((2, len(sentences), size), -1, np.int32)
    for head, relation, sentence in zip(heads, relations, sentences):
        span = slice(1, 1 + len(sentence.words))
        head[span], relation[span] = [1 + h if h >= 0 else -1 for h in sentence.heads], sentence.relations
    stop = np.array([1 + len(sentence.words) for sentence in sentences])
    maps = _read(*nnx.split(model.model), tokens, positions, jnp.asarray(word_of), size)
    pieces = jax.nn.one_hot(word_of, size, axis=1)
    vectors = pieces @ model.model.embedding.table[...][tokens] / jnp.maximum(pieces.sum(-1, keepdims=True), 1)
    index = np.arange(size)
    return dict(maps=maps.swapaxes(1, 2), heads=jnp.asarray(heads), relations=jnp.asarray(relations), words=jnp.asarray((index > 0) & (index < stop[:, None])),
                stop=jnp.asarray(stop), vectors=vectors)


def accuracies(data):
    """Of all heads in both directions, and of offsets: by relation and, last, over all words that have a head."""
    every = jnp.where(data["relations"] >= 0, 0, -1)

    def both(predicted):
        by = [analysis.uas_by_relation(predicted, data["heads"], *of) for of in ((data["relations"], len(grammar.RELATIONS)), (every, 1))]
        return np.concatenate(by, axis=-1)

    found = np.stack([both(analysis.head_as_parser(data["maps"], data["words"], mode)) for mode in MODES])
    return found.reshape(-1, found.shape[-1]), np.stack([both(analysis.offset_baseline(data["words"], offset)) for offset in OFFSETS])


def probe(trial, name, train, test):
    """The share of the test's words, roots aside, whose head a probe finds."""
    count, features = np.prod(train["maps"].shape[:2]), train["vectors"].shape[-1]
    rngs = nnx.Rngs(trial.seed)
    module = {PROBES[0]: lambda: analysis.AttentionProbe(count, rngs=rngs), PROBES[1]: lambda: analysis.AttentionWordProbe(count, features, rngs=rngs),
              PROBES[2]: lambda: analysis.WordDistanceProbe(features, rngs=rngs)}[name]()
    params, apply = functional(module)

    def logits(params, data, rows):
        maps = data["maps"][:, :, rows].reshape(count, -1, *data["maps"].shape[3:]).swapaxes(0, 1)
        words, vectors, stop = (data[key][rows] for key in ("words", "vectors", "stop"))
        inputs = {PROBES[0]: (maps, 0 * stop, stop, words), PROBES[1]: (maps, 0 * stop, stop, words, vectors), PROBES[2]: (words, vectors)}[name]
        return apply(params, *inputs)

    def loss(params, rows, key):
        root = (train["heads"][rows] < 0) & (train["relations"][rows] < 0) & train["words"][rows]
        counted = (train["relations"][rows] >= 0) | (root & (jnp.arange(root.shape[1]) < train["stop"][rows, None] - 1))  # the full stop has no head
        target = jnp.where(root, ROOT, 1 + train["heads"][rows])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, train, rows), target), where=counted)

    sample = lambda key: jax.random.choice(key, train["heads"].shape[0], (8,), replace=False)
    params = fit(loss, params, sample, steps=trial.scaled(1000), trial=trial, optimizer=optax.adam(RATES[name]), name=f"probe of {name}")
    found = jnp.argmax(jax.jit(lambda params: logits(params, test, jnp.arange(test["heads"].shape[0])))(params), axis=-1) - 1
    return jnp.mean(found == test["heads"], where=test["relations"] >= 0)


def run(trial: Trial):
    """Reads the sentences, chooses by one half and measures by the other."""
    count = trial.scaled(SENTENCES, 16)
    data = read(grammar.sentences(trial.seed, count))
    half = lambda first, last: {key: x[:, :, first:last] if key == "maps" else x[first:last] for key, x in data.items()}
    train, test = half(0, count // 2), half(count // 2, count)
    trial.report(0.2, "maps read")
    (heads, offsets), (test_heads, test_offsets) = accuracies(train), accuracies(test)
    best, best_offset = np.argmax(heads, axis=0), np.argmax(offsets, axis=0)
    measured = {}
    for index, name in enumerate((*grammar.RELATIONS, "all")):
        measured |= {f"{name}, head": test_heads[best[index], index], f"{name}, offset": test_offsets[best_offset[index], index]}
    gains = (heads.max(0) - offsets.max(0))[:-1]
    chosen = grammar.RELATIONS[int(np.argmax(gains))]
    measured["gain of the chosen relation"] = measured[f"{chosen}, head"] - measured[f"{chosen}, offset"]
    layers, per, *_ = data["maps"].shape
    some = test["maps"][:, :, :trial.scaled(50)]
    seen = jnp.arange(some.shape[-1]) <= test["stop"][:some.shape[2], None]
    distances = jax.jit(analysis.head_distances)(some.reshape(layers * per, *some.shape[2:]), seen) / jnp.sum(seen)
    layer = np.arange(layers * per) // per
    same, other = (layer[:, None] == layer) & ~np.eye(layers * per, dtype=bool), layer[:, None] != layer
    measured |= {"within layers": jnp.mean(distances, where=same), "between layers": jnp.mean(distances, where=other)}
    points = analysis.embed_heads(distances)
    to_stop = jnp.take_along_axis(test["maps"], test["stop"][None, None, :, None, None], axis=-1)[..., 0]
    here = jnp.arange(to_stop.shape[-1]) <= test["stop"][:, None]
    measured |= {"to [SEP]": jnp.mean(to_stop, axis=(1, 2, 3), where=here), "points, first": points[:, 0], "points, second": points[:, 1]}
    for index, name in enumerate(PROBES):
        measured[f"probe of {name}"] = probe(trial.part(0.4 + 0.2 * index, 0.6 + 0.2 * index), name, train, test)
    return measured


def draw(figure, seeds):
    """Heads against offsets by relation, heads as points, and attention to [SEP]."""
    top, bottom = figure.subfigures(2, 1)
    left, right = top.subplots(1, 2, width_ratios=(3, 1))
    names = (*grammar.RELATIONS, "all")
    for shift, what in ((-0.2, "head"), (0.2, "offset")):
        left.bar(np.arange(len(names)) + shift, [np.mean([seed[f"{name}, {what}"] for seed in seeds]) for name in names], 0.4, label=f"best {what}", alpha=0.75)
    left.set_xticks(range(len(names)), [name.replace("prepositional", "prep.") for name in names], rotation=20, ha="right", fontsize=8)
    left.set_ylabel("share of words")
    left.set_ylim(0, 1.35)
    left.legend(frameon=False, ncol=2, loc="upper right")
    bars(right, {name: [seed[f"probe of {name}"] for seed in seeds] for name in PROBES}, "found by probes")
    points, share = bottom.subplots(1, 2)
    layers = len(seeds[0]["to [SEP]"])
    first, second = (np.array(seeds[0][f"points, {axis}"]).reshape(layers, -1) for axis in ("first", "second"))
    for layer in range(layers):
        points.scatter(first[layer], second[layer], s=12, color=f"C{layer}", label=f"layer {layer + 1}")
    points.legend(frameon=False, fontsize=7, ncol=2)
    points.set_title("heads, by divergence", fontsize=9)
    bars(share, {str(layer + 1): [seed["to [SEP]"][layer] for seed in seeds] for layer in range(layers)}, "attention to [SEP]")
    share.set_xlabel("layer")


claim = Claim(
    id="bert-attention-analysis",
    run=run,
    criteria=(
        Criterion("gain of the best head over the best offset, in the relation that gains most: above 15 points", lambda m: m["gain of the chosen relation"] - 0.15),
        Criterion("mean divergence of heads: less within layers than between", lambda m: m["between layers"] - m["within layers"]),
        Criterion("share of heads found: probe of the maps above the best single head", lambda m: m["probe of maps"] - m["all, head"])),
    table=(("", "best head", "best offset"),
           {name: (f"{name}, head", f"{name}, offset") for name in (*grammar.RELATIONS, "all")}
           | {f"probe of {name}": (f"probe of {name}", "") for name in PROBES}
           | {"divergence within / between layers": ("within layers", "between layers")}),
    draw=draw)
