"""A stack of equal blocks, scanned: compiled once whatever its depth."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnx.core import cache
from attnx.nn.recording import Tape, join


class Stack(nnx.Module):
    """``num_layers`` blocks in sequence, evaluated by a scan over stacked parameters.

    Every parameter has a leading axis of groups of layers, with the logical name 'layers'. Where blocks alternate
    (``make_block`` a sequence), a group is one round of the alternation. Blocks are pure functions of their parameters: variables that a block
    would change in its call (counters, running averages) do not come back from the scan.

    Args:
      make_block: ``make_block(rngs=...) -> block``, or a sequence of them to be repeated in turn. A block is called like
        :class:`attnx.nn.TransformerBlock`.
      num_layers: how many blocks; a multiple of the length of the sequence.
      unroll: how many groups to write out in each iteration of the compiled scan: 1 compiles fastest, True (all of them) trains fastest.
      remat: what the backward pass recomputes: None (nothing), or a policy of ``jax.checkpoint_policies`` or its name; 'nothing_saveable'
        keeps only the input of each group.
      rngs: the generator of initial values.

    Raises:
      ValueError: for a number of layers that is not a positive multiple of the number of makers, or an unknown policy.

    Example:
      >>> import attnx, jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnx.nn import Attention, TransformerBlock
      >>> def make_block(*, rngs):
      ...     return TransformerBlock(8, attention=Attention(8, 2, mechanism=attnx.pairs(), rngs=rngs), rngs=rngs)
      >>> stack = Stack(make_block, 3, rngs=nnx.Rngs(0))
      >>> stack(jnp.ones((1, 4, 8))).shape, stack.blocks[0].attention.query.kernel.shape
      ((1, 4, 8), (3, 8, 2, 4))
    """

    def __init__(self, make_block: Callable[..., nnx.Module] | Sequence[Callable[..., nnx.Module]], num_layers: int, *, unroll: int | bool = 1,
                 remat: str | Callable | None = None, rngs: nnx.Rngs):
        makers = (make_block,) if callable(make_block) else tuple(make_block)
        if num_layers < 1 or num_layers % len(makers):
            raise ValueError(f"num_layers: expected a positive multiple of the {len(makers)} kinds of block, got {num_layers}")
        if isinstance(remat, str):
            if not hasattr(jax.checkpoint_policies, remat):
                raise ValueError(f"remat: expected the name of a policy in jax.checkpoint_policies, got {remat!r}")
            remat = getattr(jax.checkpoint_policies, remat)
        self.num_groups, self.unroll, self.remat = num_layers // len(makers), unroll, remat

        @nnx.split_rngs(splits=self.num_groups)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def create(rngs):
            return nnx.List([make(rngs=rngs) for make in makers])

        self.blocks = create(rngs)

    def __call__(self, x: Float[Array, "B T D"], *, dropout_key: Array | None = None, **inputs) -> Float[Array, "B T D"]:
        """Runs x [B, T, D] through all blocks.

        Args:
          x: [B, T, D].
          dropout_key: split over the layers; None for no dropout.
          **inputs: handed to every block: positions, segment_ids, context, hooks, ...

        Returns:
          [B, T, D].
        """
        def body(x, group, blocks):
            key = None if keys is None else keys[group]
            for i, block in enumerate(blocks):
                own = None if key is None else jax.random.fold_in(key, i)
                x = block(x, dropout_key=own, layer=group * len(blocks) + i, **inputs)
            return x

        keys = None if dropout_key is None else jax.random.split(dropout_key, self.num_groups)
        return self._scan(body, x, inputs.get("hooks"), self.unroll, self.remat)

    def init_state(self, batch: int, max_length: int, **inputs) -> tuple[Any, ...]:
        """The states of all blocks, stacked like the parameters; ``inputs`` (context, dtype, ...) as for a block's ``init_state``."""
        graphdef, params = nnx.split(self.blocks)
        return jax.vmap(lambda params: tuple(block.init_state(batch, max_length, **inputs)
                                             for block in nnx.merge(graphdef, params)))(params)

    def step(self, state, x: Float[Array, "B t D"], **inputs) -> tuple[tuple[Any, ...], Float[Array, "B t D"]]:
        """Runs the next tokens x [B, t, D] through all blocks: ``(state, [B, t, D])``.

        The stacked states are carried from group to group and changed where they lie: a token costs no copy of the caches.
        """
        def body(carry, group, blocks):
            x, states = carry
            before = _take(states, group)
            after = []
            for i, (block, state) in enumerate(zip(blocks, before)):
                state, x = block.step(state, x, layer=group * len(blocks) + i, **inputs)
                after.append(state)
            return x, _put(states, before, tuple(after), group)

        x, state = self._scan(body, (x, state), inputs.get("hooks"))
        return state, x

    def _scan(self, body, x, hooks, unroll=1, remat=None):
        """Folds ``body(x, group, blocks) -> x`` over the groups; what hooks put on tape comes out of the scan."""
        graphdef, params = nnx.split(self.blocks)
        tapes = [hook for hook in (hooks or {}).values() if isinstance(hook, Tape)]

        def one(x, row):
            group, params = row
            before = [tape.take() for tape in tapes]
            x = body(x, group, nnx.merge(graphdef, params))
            kept = [join(tape.take()) for tape in tapes]
            for tape, earlier in zip(tapes, before):
                tape.kept = earlier
            return x, kept

        if remat is not None:
            one = jax.checkpoint(one, policy=remat, prevent_cse=False)
        x, kept = jax.lax.scan(one, x, (jnp.arange(self.num_groups), params), unroll=unroll)
        for tape, values in zip(tapes, kept):
            if values is not None:
                tape.kept.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), values))
        return x


def _is_cache(x):
    return isinstance(x, cache.KVCache)


def _take(states, group):
    """The states of one group of blocks among stacked ones; caches stay where they lie."""
    return jax.tree.map(lambda x: cache.layer_of(x, group) if _is_cache(x) else x[group], states, is_leaf=_is_cache)


def _put(states, before, after, group):
    """The stacked states with those of one group as they have become; what did not change is not written."""
    def put(stack, before, after):
        if isinstance(after, cache.LayerCache):
            return cache.stacked(stack, after)
        if after is before:
            return stack
        return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, group, 0), stack, after)

    return jax.tree.map(put, states, before, after, is_leaf=_is_cache)
