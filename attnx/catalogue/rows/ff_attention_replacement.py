"""Feed-forward networks in the place of attention."""

import jax.numpy as jnp

from attnx import mixers
from attnx.catalogue.entry import SEEN, Entry, Example, Input, stream
from attnx.catalogue.modules import parameters, rebuild

LENGTH, FEATURES, HIDDEN = 7, 4, 6


def encoder(rngs):
    """From a sentence."""
    return mixers.SentenceFF(LENGTH, FEATURES, HIDDEN, 5, rngs=rngs)


def decoder(rngs):
    """From the sentence so far."""
    return mixers.CausalSentenceFF(LENGTH, FEATURES, HIDDEN, 5, rngs=rngs)


def cross(rngs):
    """From a token and a sentence."""
    return mixers.CrossSentenceFF(LENGTH, FEATURES, HIDDEN, 5, rngs=rngs)


def positions_of(seen):
    """Of tokens of which some are padding."""
    return jnp.where(seen, jnp.arange(seen.shape[1], dtype=jnp.int32), -1)


def encode(case, params, x, seen):
    """The encoder's; every output depends on all tokens."""
    if case.causal:
        raise NotImplementedError("CausalSentenceFF is causal")
    return rebuild(encoder, params)(x, positions=positions_of(seen))


def decode(case, params, x, seen):
    """The decoder's, to itself."""
    if not case.causal:
        raise NotImplementedError("SentenceFF is not causal")
    network = rebuild(decoder, params)
    network.implementation = case.implementation
    if case.execution == "step":
        return stream(network.step, network.init_state(x.shape[0], x.shape[1], dtype=x.dtype), x)
    return network(x, positions=positions_of(seen))


def decode_cross(case, params, x, context, seen):
    """The decoder's, to the encoder's vectors."""
    if case.causal or not case.cross:
        raise NotImplementedError("the context is read whole")
    network = rebuild(cross, params)
    network.implementation = case.implementation
    if case.execution == "recurrent":
        return stream(network.step, network.init_state(x.shape[0], x.shape[1], context=context, context_positions=positions_of(seen)), x)
    return network(x, context, context_positions=positions_of(seen))


def example(call, make, **options):
    """Of sentences of at most seven tokens."""
    sizes = {"d": FEATURES, "t": LENGTH, "s": LENGTH}
    return Example(call, {"params": parameters(make), "x": "btd", "seen": Input("bt", lambda normal: normal > -1)} | options.pop("inputs", {}), "bte", mask="seen",
                   sizes=sizes, lengths=(1, 5), **options)


def layer(features, num_heads, *, length, rngs):
    """A decoder's, of size S and at least as wide as the tokens are."""
    hidden = max(mixers.hidden_size("ALR", "S", length, features), features)
    return mixers.CausalSentenceFF(length, features, hidden, rngs=rngs)


entry = Entry(
    id="ff-attention-replacement",
    objects=(mixers.SentenceFF, mixers.CausalSentenceFF, mixers.CrossSentenceFF, mixers.HeadwiseFF, mixers.hidden_size, mixers.distill_attention,
             mixers.extract_io, mixers.swap, mixers.distillation_loss),
    equation="""out = F(flatten(x_1 .. x_L)),       F(u) = LayerNorm(leaky_relu(LayerNorm(u) W_1 + b_1)) W_2 + b_2
trained to give what an attention layer gives (ALR), a sub-layer (ALRR), each head (ALSR) or a layer (ELR)""",
    claim="They replace self-attention in encoder and decoder at little cost in translation, but not attention to the encoder.",
    examples=(example(encode, encoder, patterns=("noncausal self",), name="encoder"),
              example(decode, decoder, patterns=("causal self",), executions=("reference", "parallel", "step"), linear="t", name="decoder"),
              example(decode_cross, cross, patterns=("noncausal cross",), executions=("reference", "parallel", "recurrent"),
                      inputs={"context": "bsd", "seen": SEEN}, name="decoder, to a context")),
    notes="A decoder's outputs follow from running sums of the first layer's summands, so that all of them cost as much as one, and a stream's state is constant; what "
          "is released reads a masked copy of the sentence for each. Of attention to a context the input, a token before the padded context, is this library's reading.",
    causal_layer=layer,
)
