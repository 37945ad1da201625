"""Token-aware pooling and the attention diversification loss."""

import jax

from attnx import objectives
from attnx.catalogue.entry import SEEN, Entry, Example, Input
from attnx.catalogue.modules import parameters, rebuild


def make(rngs):
    """A small one."""
    return objectives.TAPBlock(4, 2, hidden_features=6, rngs=rngs)


def diversify(case, maps, seen):
    """The loss of each image; ``maps`` are weights of its tokens."""
    one = lambda maps, seen: objectives.attention_diversification_loss(maps[None], threshold=1.0, mask=seen[None])
    return jax.vmap(one)(maps, seen).astype(maps.dtype)


entry = Entry(
    id="tap-adl-robust-token-attention",
    objects=(objectives.TAPBlock, objectives.TokenAwarePooling, objectives.token_aware_pool, objectives.dilated_average_pool,
             objectives.attention_diversification_loss),
    equation="""x <- x + gamma attention(LN(x')),    x'(p) = sum_k softmax_k(conv(BN(conv(x))))(p) pool_k(p),    pool_0 = x, pool_k a 3 x 3 mean of dilation k
loss += mean over layers and rows i of cos(abar+, A+_i),    A+ = A where A > 2 / T,  abar its mean row""",
    claim="With both, a vision transformer trained on clean images keeps more of its accuracy on corrupted ones, and its attention changes less.",
    examples=(
        Example(lambda case, params, x: rebuild(make, params)(x), {"params": parameters(make), "x": "bxyf"}, "bxyf", sizes={"x": 4, "y": 3, "f": 4}, name="block"),
        Example(diversify, {"maps": Input("bnts", lambda normal: jax.nn.softmax(2 * normal)), "seen": SEEN}, "b", mask="seen", empty="finite",
                sizes={"t": 9, "s": 9}, lengths=(), name="loss"),
    ),
    notes="The loss is the mean over layers; the released code divides by their number plus 1e-6, and returns zero for a batch of one.",
)
