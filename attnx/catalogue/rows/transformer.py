"""The original transformer."""

import jax.numpy as jnp

from attnx import models
from attnx.catalogue.entry import SEEN, Entry, Example, Input, stream
from attnx.catalogue.modules import parameters, rebuild

VOCABULARY = 11


def make(rngs):
    """A small one."""
    return models.OriginalTransformer(vocab_size=VOCABULARY, features=8, hidden_features=16, num_heads=2, num_layers=1, rngs=rngs)


def decode(case, params, source, target, seen):
    """The decoder's vectors of the last layer, at once or token by token; source tokens not seen are padding."""
    model = rebuild(make, params)
    positions = jnp.where(seen, jnp.arange(source.shape[1], dtype=jnp.int32), -1)
    if case.execution == "recurrent":
        state = model.init_state(source, target.shape[1], source_positions=positions)
        return stream(model.decoder.hidden_step, state, target)
    return model.decoder.hidden(target, context=model.encoder(source, positions), context_positions=positions)


_words = lambda normal: jnp.int32(jnp.abs(normal) * 4) % VOCABULARY

entry = Entry(
    id="transformer",
    objects=(models.OriginalTransformer, models.original_config, models.noam_schedule, models.label_smoothed_cross_entropy),
    equation="""x <- LayerNorm(x + dropout(f(x))),    f: multi-head softmax(q k^T / sqrt(d)) v within, then to the encoder; max(0, x W_1 + b_1) W_2 + b_2
x_0 = sqrt(D) E[token] + PE,    PE(p)_2i = sin(p / 10000^(2i/D)),  PE(p)_(2i+1) = cos(the same),    logits = x E^T""",
    claim="Attention alone transduces sequences better than recurrent encoder-decoders with attention, for a fraction of the training; its positions matter.",
    examples=(Example(decode, {"params": parameters(make), "source": Input("bs", _words), "target": Input("bt", _words), "seen": SEEN}, "btd",
                      executions=("parallel", "recurrent"), mask="seen", empty="finite", sizes={"d": 8}),),
    notes="All projections have biases, as in most ports; the paper writes them for the feed-forward layers alone. nn.Attention, the masks and caches are the "
          "library's own: this row is the paper's configuration of them.",
)
