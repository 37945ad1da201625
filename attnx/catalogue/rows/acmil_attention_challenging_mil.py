"""Attention-challenging multiple-instance learning."""

from attnx import fusion
from attnx.catalogue.entry import SEEN, Entry, Example
from attnx.catalogue.modules import parameters, rebuild


def make(rngs):
    """A small one."""
    return fusion.ACMIL(4, 3, features=6, attention_features=5, branches=3, rngs=rngs)


def make_heads(rngs):
    """A small one of several heads."""
    return fusion.MultiHeadACMIL(4, 3, features=6, num_heads=2, branches=3, rngs=rngs)


entry = Entry(
    id="acmil-attention-challenging-mil",
    objects=(fusion.ACMIL, fusion.MultiHeadACMIL, fusion.gated_mil_scores, fusion.mask_top_instances, fusion.branch_pool, fusion.branch_diversity_loss,
             fusion.acmil_loss),
    equation="""S = (tanh(h V + b_v) * sigmoid(h U + b_u)) W + b,    A_m = softmax_n(S_mn, some of its top K masked in training),    f = sum_n mean_m(A_mn) h_n
loss = CE(bag) + mean_m CE(branch m) + mean over i < j of cos(A_i, A_j)""",
    claim="Branches that differ and top instances masked at random spread attention and classify bags at least as well as gated attention.",
    examples=tuple(Example(lambda case, params, x, seen, make=make: rebuild(make, params)(x, mask=seen).logits,
                           {"params": parameters(make), "x": "bsf", "seen": SEEN}, "bc", mask="seen", empty="finite", linear="s", sizes={"f": 4, "c": 3}, name=name)
                   for make, name in ((make, "gated"), (make_heads, "multi-head"))),
    notes="The number of masked instances is int(min(K, instances of the bag) share), padding not counted. The released code masks none by default, and its "
          "authors note that this is sometimes better.",
)
