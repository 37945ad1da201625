"""SHA-RNN: an LSTM language model with one head of attention, which has next to no parameters, and feed-forward layers with one matrix.

Merity: "Single Headed Attention RNN: Stop Thinking With Your Head" (2019, arXiv 1911.11423). With h of the LSTM, m = LN(h) of all tokens remembered, S(z) = sigmoid(z):

    q = LN(h W_q + b_q) S(a_q),    k = m S(a_k),    v = m o,     o = S(F) tanh(C),  [C, F] = S(a_v) W_o + b_o        out_i = softmax_j(q_i . k_j / sqrt(D)) v_j
    boom(x) = sum over c of u_c,      u = gelu(x W + b) of 4 D numbers cut into chunks of D,   gelu(z) = z S(1.702 z)

Keys and values are the memory itself but for one vector each, o being a constant once trained (:meth:`SingleHead.collapse`); there is no output projection, and the
LSTM stands for positions. A segment of text attends to itself causally and to the last M tokens of those before, which get no gradient.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.core import cache, checks
from attnx.core.attention import attention
from attnx.masks.causal import causal
from attnx.nn.common import check_sequence, dropout, refuse
from attnx.nn.embedding import Embedding
from attnx.nn.lstm import LSTMState, StackedLSTM

EPSILON = 1e-12  # of the norms


def boom(x: Float[Array, "... D"], kernel: Float[Array, "D F"], bias: Float[Array, " F"]) -> Float[Array, "... D"]:
    """A feed-forward layer that widens by a matrix and narrows by sums: ``sum of the chunks of gelu(x W + b)``, ``gelu(z) = z sigmoid(1.702 z)``.

    Args:
      x: [..., D].
      kernel: W, [D, F], F at least D; what exceeds a multiple of D is not used.
      bias: b, [F].

    Returns:
      [..., D] in the dtype of x.

    Cost: O(D F) a token, one of the two matrices of an MLP.

    >>> boom(jnp.ones((1, 2)), jnp.eye(2, 4), jnp.zeros(4)).shape
    (1, 2)
    """
    features = x.shape[-1]
    if kernel.ndim != 2 or kernel.shape[0] != features or kernel.shape[1] < features or bias.shape != kernel.shape[1:]:
        raise ValueError(f"kernel: expected shape [{features}, F] with F of at least {features}, and bias [F], got {checks.describe(kernel)} and {checks.describe(bias)}")
    u = jnp.matmul(x, kernel, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)) + bias
    u = u * jax.nn.sigmoid(1.702 * u)
    chunks = kernel.shape[1] // features
    return u[..., :chunks * features].reshape(*x.shape[:-1], chunks, features).sum(axis=-2).astype(x.dtype)


class SingleHeadParams(NamedTuple):
    """Parameters of :func:`single_head_attention`.

    Attributes:
      kernel, bias: W_q [D, D] and b_q [D].
      norm_scale, norm_bias: of the norm of queries, [D].
      query, key: a_q and a_k, [D].
      value: o, [D]; see :func:`value_gate`.
    """

    kernel: Float[Array, "D D"]
    bias: Float[Array, " D"]
    norm_scale: Float[Array, " D"]
    norm_bias: Float[Array, " D"]
    query: Float[Array, " D"]
    key: Float[Array, " D"]
    value: Float[Array, " D"]


def value_gate(vector: Float[Array, " D"], kernel: Float[Array, "D 2D"], bias: Float[Array, " 2D"]) -> Float[Array, " D"]:
    """The over-parametrised gate of values: ``sigmoid(F) tanh(C)`` with ``[C, F] = sigmoid(a_v) W_o + b_o``.

    >>> gate = value_gate(jnp.zeros(2), jnp.ones((2, 4)), jnp.zeros(4))
    >>> bool(jnp.allclose(gate, jax.nn.sigmoid(1.0) * jnp.tanh(1.0)))
    True
    """
    content, gate = jnp.split(jax.nn.sigmoid(vector) @ kernel + bias, 2)
    return jax.nn.sigmoid(gate) * jnp.tanh(content)


def single_head_attention(query: Float[Array, "B T D"], memory: Float[Array, "B S D"], params: SingleHeadParams, *, query_positions: Int[Array, "*B T"] | None = None,
                          key_positions: Int[Array, "*B S"] | None = None, is_causal: bool = True, **options) -> Float[Array, "B T D"]:
    """One head of attention to a memory whose entries are keys and values but for a vector each.

    ::

        out_i = sum over j of softmax_j(q_i . k_j / sqrt(D)) v_j,     q = LN(query W_q + b_q) sigmoid(a_q),   k = memory sigmoid(a_k),   v = memory o

    Args:
      query: [B, T, D], tokens.
      memory: [B, S, D]: what is remembered of earlier tokens, then the same of these, S = M + T.
      params: see :class:`SingleHeadParams`.
      query_positions, key_positions: logical positions, int32 [T] or [B, T], [S] or [B, S]; -1 is padding. By default keys count from 0, and queries are the last.
      is_causal: whether a token sees nothing later than itself.
      **options: implementation, dropout_rate, dropout_key, ... as in :func:`attnx.attention`.

    Returns:
      [B, T, D] in the dtype of the query.

    Raises:
      ValueError: shapes that do not fit.

    Cost: O(T S D) time, O(T + S) memory, D^2 + O(D) parameters.

    >>> d = jnp.zeros(4)
    >>> params = SingleHeadParams(jnp.eye(4), d, d + 1, d, d, d, d + 0.5)
    >>> single_head_attention(jnp.ones((1, 2, 4)), jnp.ones((1, 5, 4)), params)[0, 0]
    Array([0.5, 0.5, 0.5, 0.5], dtype=float32)
    """
    features = query.shape[-1]
    for name, x in (("query", query), ("memory", memory)):
        if x.ndim != 3 or (x.shape[0], x.shape[2]) != (query.shape[0], features):
            raise ValueError(f"{name}: expected shape [{query.shape[0]}, tokens, {features}] as query, got {checks.describe(x)}")
    if params.kernel.shape != (features, features):
        raise ValueError(f"params.kernel: expected shape [{features}, {features}], got {checks.describe(params.kernel)}")
    if query_positions is None:
        query_positions = memory.shape[1] - query.shape[1] + jnp.arange(query.shape[1], dtype=jnp.int32)
    q = jnp.matmul(query, params.kernel, preferred_element_type=jnp.promote_types(query.dtype, jnp.float32)) + params.bias
    q = q - q.mean(axis=-1, keepdims=True)
    q = q * jax.lax.rsqrt(jnp.mean(q * q, axis=-1, keepdims=True) + EPSILON)
    q = (q * params.norm_scale + params.norm_bias) * jax.nn.sigmoid(params.query)
    heads = (q, memory * jax.nn.sigmoid(params.key), memory * params.value)
    return attention(*(x[:, :, None].astype(query.dtype) for x in heads), mask=causal() if is_causal else None, query_positions=query_positions,
                     key_positions=key_positions, **options)[:, :, 0]


class SingleHead(nnx.Module):
    """:func:`single_head_attention` with its parameters.

    Args:
      features: D.
      std: of the initial matrices; 0.1 / sqrt(D) by default.
      rngs: the generator of initial values.

    >>> head = SingleHead(4, rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (1, 3, 4))
    >>> before = head(x, x)
    >>> head.collapse()
    >>> bool(jnp.allclose(head(x, x), before, atol=1e-6)), head.value_kernel
    (True, None)
    """

    def __init__(self, features: int, *, std: float | None = None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        std = 0.1 / features**0.5 if std is None else std
        matrix = lambda *shape: nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))
        vector = lambda size=features, value=0.0: nnx.Param(jnp.full(size, value, param_dtype))
        self.kernel, self.bias, self.norm_scale, self.norm_bias = matrix(features, features), vector(), vector(value=1.0), vector()
        self.query, self.key, self.value = vector(), vector(), vector()
        self.value_kernel, self.value_bias = nnx.data(matrix(features, 2 * features)), nnx.data(vector(2 * features))

    @property
    def params(self) -> SingleHeadParams:
        """Its parameters as arrays."""
        value = self.value[...] if self.value_kernel is None else value_gate(self.value[...], self.value_kernel[...], self.value_bias[...])
        return SingleHeadParams(*(x[...] for x in (self.kernel, self.bias, self.norm_scale, self.norm_bias, self.query, self.key)), value)

    def collapse(self) -> None:
        """Keeps the gate of values as the constant vector that it is, and drops what made it; for use after training."""
        self.value.set_value(self.params.value)
        self.value_kernel = self.value_bias = nnx.data(None)

    def __call__(self, query: Float[Array, "B T D"], memory: Float[Array, "B S D"], **options) -> Float[Array, "B T D"]:
        """As :func:`single_head_attention`."""
        return single_head_attention(query, memory, self.params, **options)


class ShaRnnState(NamedTuple):
    """What a block remembers: its LSTM's state, and the last M tokens with their positions, once (None without attention)."""

    lstm: LSTMState
    memory: Any


class ShaRnnBlock(nnx.Module):
    """LSTM, single-headed attention to what it made, boom; called like :class:`attnx.nn.Attention`.

    ::

        h <- LSTM(LN(h))  [+ LN(h)];     m = LN(h),  h <- LN(h) + attention(LN(h), m of this and remembered tokens);     h <- LN(h) + boom(LN(h))

    Each LN is a norm of its own. A call reads one segment, a :meth:`step` the next: streams of any cut find the same, as long as no more than M tokens went before.

    Args:
      features: D.
      attention: whether it attends.
      boom_features: F of boom, 4 D by default; 0 for a block without.
      memory_size: M, the most tokens remembered.
      residual: whether the LSTM's input is added to its output; the paper's final models do not.
      dropout_rate: of what the LSTM, attention and boom find.
      implementation: as in :func:`attnx.attention`.
      rngs: the generator of initial values.

    Cost: O(T D^2) in T steps, and O(T (M + T) D) of attention; state O(M D).

    >>> block = ShaRnnBlock(8, memory_size=6, rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    >>> state, first = block.step(block.init_state(1, 6), x[:, :4])
    >>> state, last = block.step(state, x[:, 4:])
    >>> bool(jnp.allclose(jnp.concatenate([first, last], axis=1), block(x), atol=1e-5))
    True
    """

    def __init__(self, features: int, *, attention: bool = True, boom_features: int | None = None, memory_size: int = 5000, residual: bool = False,
                 dropout_rate: float = 0.0, implementation: str | None = None, param_dtype=jnp.float32, rngs: nnx.Rngs):
        norm = lambda: nnx.LayerNorm(features, epsilon=EPSILON, param_dtype=param_dtype, rngs=rngs)
        self.features, self.residual, self.implementation = features, residual, implementation
        self.memory_size = checks.check_integer("memory_size", memory_size, least=0)
        self.dropout_rate = checks.check_dropout_rate(dropout_rate)
        uniform = lambda key, shape: jax.random.uniform(key, shape, param_dtype, -features**-0.5, features**-0.5)
        self.start_norm, self.lstm = norm(), StackedLSTM(features, features, kernel_init=uniform, rngs=rngs)
        self.head = SingleHead(features, param_dtype=param_dtype, rngs=rngs) if attention else nnx.data(None)
        self.memory_norm, self.middle_norm = (norm(), norm()) if attention else (nnx.data(None), nnx.data(None))
        width = 4 * features if boom_features is None else boom_features
        self.boom_kernel = self.boom_bias = self.residual_norm = self.boom_norm = nnx.data(None)
        if width:
            self.boom_kernel = nnx.Param(0.1 * features**-0.5 * jax.random.normal(rngs.params(), (features, width), param_dtype))
            self.boom_bias, self.residual_norm, self.boom_norm = nnx.Param(jnp.zeros(width, param_dtype)), norm(), norm()

    def __call__(self, x: Float[Array, "B T D"], *, positions: Int[Array, "*B T"] | None = None, segment_ids=None, dropout_key: Array | None = None, hooks=None,
                 layer=0) -> Float[Array, "B T D"]:
        """One segment with nothing before it; positions of -1 are padding, which is neither read nor remembered, and whose output means nothing."""
        check_sequence("x", x, self.features)
        refuse("a recurrent block reads one document and has no heads to look into", segment_ids=segment_ids, hooks=hooks)
        if positions is None:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        seen = jnp.broadcast_to(checks.check_positions("positions", positions, *x.shape[:2]) >= 0, x.shape[:2])
        return self._read(x, None, seen, positions, None, dropout_key)[2]

    def init_state(self, batch: int, max_length: int | None = None, *, dtype=None) -> ShaRnnState:
        """The state before the first token; it has room for ``max_length`` tokens, at most M (and M by default)."""
        dtype = dtype or self.start_norm.scale.dtype
        slots = self.memory_size if max_length is None else min(max_length, self.memory_size)
        memory = None if self.head is None or not slots else cache.init(batch, slots, 1, self.features, 0, dtype)
        return ShaRnnState(self.lstm.init_state(batch, dtype), memory)

    def step(self, state: ShaRnnState, x: Float[Array, "B t D"], *, dropout_key: Array | None = None, hooks=None, layer=0) -> tuple[ShaRnnState, Float[Array, "B t D"]]:
        """The next segment, or token: ``(state, [B, t, D])``. Nothing is learned through the state."""
        check_sequence("x", x, self.features)
        refuse("a recurrent block has no heads to look into", hooks=hooks)
        lstm, memory = jax.lax.stop_gradient(state.lstm), state.memory
        start = 0 if memory is None else memory.next
        positions = start + jnp.arange(x.shape[1], dtype=jnp.int32)
        lstm, new, out = self._read(x, lstm, None, positions, memory, dropout_key)
        if memory is not None:
            new = new[:, :, None].astype(memory.key.dtype)
            skipped = max(x.shape[1] - memory.key.shape[1], 0)
            memory = cache.append(memory._replace(next=memory.next + skipped), new[:, skipped:], new[:, skipped:, :, :0])
        return ShaRnnState(lstm, memory), out

    def _read(self, x, lstm, seen, positions, memory, key):
        """The LSTM's state, what is to be remembered of the tokens, and the output."""
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        h = self.start_norm(x)
        lstm, read = self.lstm(h, lstm, mask=seen)
        read = dropout(read, self.dropout_rate, keys[0])
        h, new = (h + read if self.residual else read), None
        if self.head is not None:
            new, h = self.memory_norm(h), self.middle_norm(h)
            known, places = new, positions
            if memory is not None:
                known = jnp.concatenate([jax.lax.stop_gradient(memory.key[:, :, 0]).astype(new.dtype), new], axis=1)
                places = jnp.concatenate([memory.positions, positions])
            found = self.head(h, known, query_positions=positions, key_positions=places, implementation=self.implementation,
                              **({} if key is None else dict(dropout_rate=self.dropout_rate, dropout_key=keys[1])))
            h = h + dropout(found, self.dropout_rate, keys[2])
        if self.boom_kernel is not None:
            h, wide = self.residual_norm(h), self.boom_norm(h)
            h = h + dropout(boom(wide, self.boom_kernel[...], self.boom_bias[...]), self.dropout_rate, keys[3])
        return lstm, new, h.astype(x.dtype)


class ShaRnn(nnx.Module):
    """The language model: embedding, blocks, and the embedding's table again. Read a text segment by segment with :meth:`step`.

    Args:
      vocab_size: V.
      features: D; 1024 in the paper.
      num_layers: how many blocks.
      attention_layers: the indices of those that attend; by default the last but one alone, in the paper's best model all.
      memory_size, residual, dropout_rate, implementation, boom_features: as in :class:`ShaRnnBlock`.
      rngs: the generator of initial values.

    >>> model = ShaRnn(11, 8, memory_size=16, rngs=nnx.Rngs(0))
    >>> tokens = jnp.arange(10).reshape(1, 10)
    >>> state, first = model.step(model.init_state(1), tokens[:, :5])
    >>> state, last = model.step(state, tokens[:, 5:])
    >>> bool(jnp.allclose(jnp.concatenate([first, last], axis=1), model(tokens), atol=1e-5))
    True
    """

    def __init__(self, vocab_size: int, features: int, num_layers: int = 4, *, attention_layers: Sequence[int] | None = None, memory_size: int = 5000,
                 residual: bool = False, dropout_rate: float = 0.0, boom_features: int | None = None, implementation: str | None = None, param_dtype=jnp.float32,
                 rngs: nnx.Rngs):
        chosen = (max(num_layers - 2, 0),) if attention_layers is None else tuple(attention_layers)
        if any(not 0 <= index < num_layers for index in chosen):
            raise ValueError(f"attention_layers: expected indices of {num_layers} layers, got {chosen}")
        self.embedding = Embedding(vocab_size, features, embedding_init=nnx.initializers.normal(0.1 * features**-0.5), param_dtype=param_dtype, rngs=rngs)
        self.blocks = nnx.List([ShaRnnBlock(features, attention=index in chosen, boom_features=boom_features, memory_size=memory_size, residual=residual,
                                            dropout_rate=dropout_rate, implementation=implementation, param_dtype=param_dtype, rngs=rngs)
                                for index in range(num_layers)])

    def __call__(self, tokens: Int[Array, "B T"], *, positions: Int[Array, "*B T"] | None = None, dropout_key: Array | None = None) -> Float[Array, "B T V"]:
        """Logits of the token after each, of one segment with nothing before it."""
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, positions=positions, dropout_key=_fold(dropout_key, index))
        return self.embedding.logits(x)

    def init_state(self, batch: int, max_length: int | None = None, *, dtype=None) -> tuple[ShaRnnState, ...]:
        """The states of all blocks before the first token."""
        return tuple(block.init_state(batch, max_length, dtype=dtype) for block in self.blocks)

    def step(self, state: tuple[ShaRnnState, ...], tokens: Int[Array, "B t"], *, dropout_key: Array | None = None
             ) -> tuple[tuple[ShaRnnState, ...], Float[Array, "B t V"]]:
        """The next segment, or token: ``(state, logits [B, t, V])``."""
        x, after = self.embedding(tokens), []
        for index, (block, own) in enumerate(zip(self.blocks, state, strict=True)):
            own, x = block.step(own, x, dropout_key=_fold(dropout_key, index))
            after.append(own)
        return tuple(after), self.embedding.logits(x)

    def collapse(self) -> None:
        """:meth:`SingleHead.collapse` of every layer that attends."""
        for block in self.blocks:
            if block.head is not None:
                block.head.collapse()


def _fold(key, index):
    return None if key is None else jax.random.fold_in(key, index)
