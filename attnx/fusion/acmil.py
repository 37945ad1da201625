"""Attention-challenging multiple-instance learning: pooling of a bag by several attention branches that may not all look at the same few instances.

Zhang, Li, Sun, Zheng, Zhu, Yang: "Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification" (ECCV 2024, arXiv 2311.07125).
Of instances h_n, M branches with gated scores pool one vector each, and their mean weights that of the bag:

    S_n = W (tanh(V h_n + b_v) * sigmoid(U h_n + b_u)) + b,     A_m = softmax_n(S_mn),     f_m = sum_n A_mn h_n,     f = sum_n mean_m(A_mn) h_n

In training some of each branch's top instances are masked at random, so that their weight goes to others, and branches are trained to classify alone while
weights of different branches are pushed apart. Good where few instances decide (slides of tissue) and attention would settle on the easiest of them. With one branch
and nothing masked it is the gated attention of Ilse, Tomczak, Welling: "Attention-based Deep Multiple Instance Learning" (ICML 2018, arXiv 1802.04712).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks
from attnx.core.halves import attend_scores
from attnx.nn.common import check_sequence, dropout

_MASKED = -1e9  # the score of a masked instance: no weight beside others, an equal one where all are masked


def gated_mil_scores(instances: Float[Array, "B S L"], value_kernel: Float[Array, "L A"], gate_kernel: Float[Array, "L A"], kernel: Float[Array, "A M"], *,
                     value_bias: Float[Array, " A"] | None = None, gate_bias: Float[Array, " A"] | None = None,
                     bias: Float[Array, " M"] | None = None) -> Float[Array, "B M S"]:
    """Scores of instances by M branches that share a gated hidden layer: ``(tanh(h V + b_v) * sigmoid(h U + b_u)) W + b``.

    Args:
      instances: h [B, S, L].
      value_kernel, gate_kernel: V and U [L, A].
      kernel: W [A, M].
      value_bias, gate_bias, bias: [A], [A] and [M]; None for none.

    Returns:
      [B, M, S] in at least float32.

    Cost: O(S L A + S A M).

    >>> import jax.numpy as jnp
    >>> gated_mil_scores(jnp.ones((1, 7, 4)), jnp.ones((4, 3)), jnp.ones((4, 3)), jnp.ones((3, 2))).shape
    (1, 2, 7)
    """
    wide = lambda x: x.astype(jnp.promote_types(instances.dtype, jnp.float32))
    add = lambda x, bias: x if bias is None else x + wide(bias)
    h = wide(instances)
    hidden = jnp.tanh(add(h @ wide(value_kernel), value_bias)) * jax.nn.sigmoid(add(h @ wide(gate_kernel), gate_bias))
    return jnp.swapaxes(add(hidden @ wide(kernel), bias), 1, 2)


def mask_top_instances(scores: Float[Array, "... S"], key: Array, *, top: int = 10, share: float = 0.6, mask: Bool[Array, "... S"] | None = None):
    """Stochastic top-K instance masking, before the softmax and in training only.

    Of each row's ``min(top, S)`` largest scores ``int(min(top, S) share)``, chosen at random, become -1e9: weights of exactly zero, so that the softmax hands
    their share to the others in proportion. Where every instance is masked all weigh the same.

    Args:
      scores: [..., S].
      key: of the choice.
      top: K.
      share: p, in [0, 1].
      mask: booleans [..., S] that broadcast to the scores, which instances there are; the others count as no instances.

    Returns:
      [..., S]; the choice has no gradient.

    Cost: O(S log K) a row.

    >>> import jax, jax.numpy as jnp
    >>> masked = mask_top_instances(jnp.arange(6.0), jax.random.key(0), top=4, share=0.5)
    >>> int((masked < 0).sum()), masked[:2].tolist()
    (2, [0.0, 1.0])
    """
    top = checks.check_integer("top", top, least=0)
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a share in [0, 1], got {share}")
    size = scores.shape[-1]
    most = min(top, size)
    mask = jnp.ones((), bool) if mask is None else mask
    there = jnp.minimum(jnp.sum(jnp.broadcast_to(mask, scores.shape), axis=-1, keepdims=True), most)
    count = jnp.asarray([int(n * share) for n in range(most + 1)])[there]
    values, index = jax.lax.top_k(jnp.where(mask, jax.lax.stop_gradient(scores), -jnp.inf), most)
    # A random order of the top instances, those that are not there last; the first `count` are masked.
    noise = jnp.where(jnp.arange(most) < there, jax.random.uniform(key, values.shape), 2.0)
    chosen = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1) < count
    hidden = jnp.put_along_axis(jnp.zeros(scores.shape, bool), index, chosen, axis=-1, inplace=False)
    return jnp.where(hidden, jnp.asarray(_MASKED, scores.dtype), scores)


class Pooled(NamedTuple):
    """What branches found: vectors and weights of each, and those of the bag."""

    branches: Float[Array, "B M L"]
    weights: Float[Array, "B M S"]
    bag: Float[Array, "B L"]
    bag_weights: Float[Array, "B S"]


def branch_pool(instances: Float[Array, "B S L"], scores: Float[Array, "B M S"], *, mask: Bool[Array, "B S"] | None = None) -> Pooled:
    """Instances pooled by each branch, and by the mean of the branches' weights.

    ::

        A_m = softmax_n(S_mn),    f_m = sum_n A_mn h_n,    f = sum_n mean_m(A_mn) h_n = mean_m f_m

    Args:
      instances: h [B, S, L].
      scores: [B, M, S].
      mask: booleans [B, S], which instances there are; a bag of none pools zeros.

    Returns:
      :class:`Pooled`, vectors in the instances' dtype and weights in at least float32. O(M S L).

    >>> import jax.numpy as jnp
    >>> branch_pool(jnp.arange(4.0)[None, :, None], jnp.zeros((1, 2, 4))).bag.tolist()
    [[1.5]]
    """
    branches, weights = attend_scores(scores, instances, mask=None if mask is None else mask[:, None], return_weights=True)
    return Pooled(branches, weights, jnp.mean(branches, axis=1), jnp.mean(weights, axis=1))


def branch_diversity_loss(weights: Float[Array, "... M S"]) -> Float[Array, ""]:
    """The mean cosine between weights of different branches: ``mean over pairs i < j of cos(A_i, A_j)``.

    Args:
      weights: [..., M, S], not negative; leading axes (bags, heads) are averaged over.

    Returns:
      A number in [0, 1]: 0 where supports are disjoint (or there is one branch), 1 where all are alike. O(M^2 S).

    >>> import jax.numpy as jnp
    >>> float(branch_diversity_loss(jnp.eye(3))), float(branch_diversity_loss(jnp.ones((3, 5))).__round__(4))
    (0.0, 1.0)
    """
    count = weights.shape[-2]
    if count < 2:
        return jnp.zeros((), weights.dtype)
    square = jnp.sum(jnp.square(weights), axis=-1, keepdims=True)
    unit = weights * jax.lax.rsqrt(jnp.where(square > 0, square, 1))
    total = jnp.sum(jnp.square(jnp.sum(unit, axis=-2)), axis=-1) - jnp.sum(jnp.square(unit), axis=(-2, -1))  # of ordered pairs
    return jnp.mean(total) / (count * (count - 1))


class MILOutput(NamedTuple):
    """What a bag's classifier says: logits of the bag, those of each branch, and the weights that they are made of."""

    logits: Float[Array, "B C"]
    branch_logits: Float[Array, "B M C"]
    weights: Float[Array, "B *N M S"]
    bag_weights: Float[Array, "B *N S"]


def acmil_loss(output: MILOutput, labels: Int[Array, " B"]) -> Float[Array, ""]:
    """``CE(bag) + mean_m CE(branch m) + branch_diversity_loss(weights)``; of a model with one branch the first alone.

    >>> import jax.numpy as jnp
    >>> output = MILOutput(jnp.zeros((1, 2)), jnp.zeros((1, 3, 2)), jnp.ones((1, 3, 5)) / 5, jnp.ones((1, 5)) / 5)
    >>> float(acmil_loss(output, jnp.array([1]))).__round__(4)  # 2 log 2 + 1
    2.3863
    """
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    loss = jnp.mean(cross_entropy(output.logits, labels))
    branches = output.branch_logits.shape[1]
    if branches == 1:
        return loss
    each = cross_entropy(output.branch_logits, jnp.broadcast_to(labels[:, None], output.branch_logits.shape[:2]))
    return loss + jnp.mean(each) + branch_diversity_loss(output.weights)


class ACMIL(nnx.Module):
    """Bags of instances to classes by gated branches.

    Args:
      in_features: D, size of an instance.
      num_classes: size of the output.
      features: L, to which instances are reduced by ``relu(x W_0)``; the paper has 128 for D = 384 and 256 for D = 512.
      attention_features: A, of the gated hidden layer.
      branches: M.
      top, share: of :func:`mask_top_instances`; ``share=0`` masks nothing (the released code's default).
      rngs: the generator of initial values.

    >>> import jax, jax.numpy as jnp
    >>> model = ACMIL(16, 2, features=8, rngs=nnx.Rngs(0))
    >>> x, there = jnp.ones((2, 30, 16)), jnp.arange(30) < jnp.array([[30], [12]])
    >>> loss = acmil_loss(model(x, mask=there, key=jax.random.key(0)), jnp.array([0, 1]))  # training
    >>> model(x, mask=there).logits.shape
    (2, 2)
    """

    def __init__(self, in_features: int, num_classes: int, *, features: int = 128, attention_features: int = 128, branches: int = 5, top: int = 10,
                 share: float = 0.6, rngs: nnx.Rngs):
        self.in_features, self.top, self.share = in_features, top, share
        self.reduce = nnx.Linear(in_features, features, use_bias=False, rngs=rngs)
        self.attention_value, self.attention_gate = (nnx.Linear(features, attention_features, rngs=rngs) for _ in range(2))
        self.attention = nnx.Linear(attention_features, branches, rngs=rngs)
        self.branch_heads, self.head = _BranchHeads(branches, features, num_classes, rngs), nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"], *, mask: Bool[Array, "B S"] | None = None, key: Array | None = None) -> MILOutput:
        """Classifies bags.

        Args:
          x: instances [B, S, in_features].
          mask: booleans [B, S], which there are.
          key: of what is masked in training; None masks nothing.

        Returns:
          :class:`MILOutput`; predictions are its ``logits``.
        """
        check_sequence("x", x, self.in_features)
        h = jax.nn.relu(self.reduce(x))
        v, u, w = self.attention_value, self.attention_gate, self.attention
        scores = gated_mil_scores(h, v.kernel[...], u.kernel[...], w.kernel[...], value_bias=v.bias[...], gate_bias=u.bias[...], bias=w.bias[...])
        if key is not None:
            scores = mask_top_instances(scores, key, top=self.top, share=self.share, mask=None if mask is None else mask[:, None])
        found = branch_pool(h, scores, mask=mask)
        return MILOutput(self.head(found.bag), self.branch_heads(found.branches), found.weights, found.bag_weights)


class _BranchHeads(nnx.Module):
    """A linear classifier of its own for each branch: [B, M, L] to [B, M, C]."""

    def __init__(self, branches, features, num_classes, rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal(batch_axis=0)(rngs.params(), (branches, features, num_classes)))
        self.bias = nnx.Param(jnp.zeros((branches, num_classes)))

    def __call__(self, x):
        return jnp.einsum("bml,mlc->bmc", x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)


class MultiHeadACMIL(nnx.Module):
    """Bags of instances to classes by branches of multi-head attention, each with a learned query and projections of its own.

    ::

        S_mn = q_m W_q,m . h_n W_k,m / sqrt(H) in each head,    f_m = LN(dropout(heads of A_m h W_v,m joined, W_o,m))

    The bag pools with the branches' mean weights, head by head, through values and a projection of its own.

    Args:
      in_features, num_classes, features, branches, top, share: as in :class:`ACMIL`; each head masks instances of its own.
      num_heads: of each branch, a divisor of ``features``.
      dropout_rate: of what is pooled.
      rngs: the generator of initial values.

    >>> import jax.numpy as jnp
    >>> model = MultiHeadACMIL(16, 2, features=8, num_heads=2, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((1, 30, 16))).weights.shape
    (1, 2, 5, 30)
    """

    def __init__(self, in_features: int, num_classes: int, *, features: int = 128, num_heads: int = 8, branches: int = 5, top: int = 10,
                 share: float = 0.6, dropout_rate: float = 0.1, rngs: nnx.Rngs):
        if features % num_heads:
            raise ValueError(f"num_heads: expected a divisor of features = {features}, got {num_heads}")
        self.in_features, self.num_heads, self.top, self.share, self.dropout_rate = in_features, num_heads, top, share, dropout_rate
        size = features // num_heads
        self.reduce = nnx.Linear(in_features, features, use_bias=False, rngs=rngs)
        self.queries = nnx.Param(1e-6 * jax.random.normal(rngs.params(), (branches, features)))
        init = nnx.initializers.lecun_normal(batch_axis=0)
        kernel = lambda *shape: nnx.Param(init(rngs.params(), (shape[0], features, features)).reshape(shape))
        bias = lambda *shape: nnx.Param(jnp.zeros(shape))
        # The last of the values, projections and norms are the bag's.
        self.query_kernel, self.query_bias = kernel(branches, features, num_heads, size), bias(branches, num_heads, size)
        self.key_kernel, self.key_bias = kernel(branches, features, num_heads, size), bias(branches, num_heads, size)
        self.value_kernel, self.value_bias = kernel(branches + 1, features, num_heads, size), bias(branches + 1, num_heads, size)
        self.out_kernel, self.out_bias = kernel(branches + 1, num_heads, size, features), bias(branches + 1, features)
        self.norm_scale, self.norm_bias = nnx.Param(jnp.ones((branches + 1, features))), bias(branches + 1, features)
        self.branch_heads, self.head = _BranchHeads(branches, features, num_classes, rngs), nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"], *, mask: Bool[Array, "B S"] | None = None, key: Array | None = None) -> MILOutput:
        """Classifies bags; arguments and result as in :class:`ACMIL`, with weights of each head, [B, N, M, S]."""
        check_sequence("x", x, self.in_features)
        masking, dropping = (None, None) if key is None else jax.random.split(key)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        h = jax.nn.relu(self.reduce(x)).astype(wide)
        get = lambda param: param[...].astype(wide)
        query = jnp.einsum("ml,mlnh->mnh", get(self.queries), get(self.query_kernel)) + get(self.query_bias)
        # (h W + b) . q = h . (W q) + b . q: no keys of each branch are made
        reader = jnp.einsum("mlnh,mnh->mnl", get(self.key_kernel), query)
        constant = jnp.sum(get(self.key_bias) * query, axis=-1)
        scores = (jnp.einsum("bsl,mnl->bnms", h, reader) + constant.T[..., None]) * query.shape[-1] ** -0.5
        if masking is not None:
            scores = mask_top_instances(scores, masking, top=self.top, share=self.share, mask=None if mask is None else mask[:, None, None])
        pooled, weights = attend_scores(scores, h[:, None], mask=None if mask is None else mask[:, None, None], return_weights=True)
        pooled = jnp.concatenate([pooled, jnp.mean(pooled, axis=2, keepdims=True)], axis=2)  # [B, N, M + 1, L], the bag last
        total = jnp.concatenate([w := jnp.sum(weights, axis=-1), jnp.mean(w, axis=2, keepdims=True)], axis=2)[..., None]  # 1, or 0 in an empty bag
        values = jnp.einsum("bnml,mlnh->bnmh", pooled, get(self.value_kernel)) + total * jnp.swapaxes(get(self.value_bias), 0, 1)
        out = jnp.einsum("bnmh,mnhl->bml", values, get(self.out_kernel)) + get(self.out_bias)
        out = dropout(out, self.dropout_rate, dropping)
        out = jax.nn.standardize(out, axis=-1, epsilon=1e-6) * get(self.norm_scale) + get(self.norm_bias)
        out = out.astype(x.dtype)
        return MILOutput(self.head(out[:, -1]), self.branch_heads(out[:, :-1]), weights, jnp.mean(weights, axis=2))
