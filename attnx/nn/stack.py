"""A stack of equal blocks, scanned: compiled once whatever its depth."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnx.nn.record import Tape, join


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
        def body(x, layers, key):
            for i, (layer, block) in enumerate(layers):
                own = None if key is None else jax.random.fold_in(key, i)
                x = block(x, dropout_key=own, layer=layer, **inputs)
            return x, None

        keys = None if dropout_key is None else jax.random.split(dropout_key, self.num_groups)
        return self._scan(body, x, keys, inputs.get("hooks"), self.unroll, self.remat)[0]

    def init_state(self, batch: int, max_length: int, **inputs) -> tuple[Any, ...]:
        """The states of all blocks, stacked like the parameters; ``inputs`` (context, dtype, ...) as for a block's ``init_state``."""
        graphdef, params = nnx.split(self.blocks)
        return jax.vmap(lambda params: tuple(block.init_state(batch, max_length, **inputs)
                                             for block in nnx.merge(graphdef, params)))(params)

    def step(self, state, x: Float[Array, "B t D"], **inputs) -> tuple[tuple[Any, ...], Float[Array, "B t D"]]:
        """Runs the next tokens x [B, t, D] through all blocks: ``(state, [B, t, D])``."""
        def body(x, layers, states):
            after = []
            for (layer, block), state in zip(layers, states):
                state, x = block.step(state, x, layer=layer, **inputs)
                after.append(state)
            return x, tuple(after)

        x, state = self._scan(body, x, state, inputs.get("hooks"))
        return state, x

    def _scan(self, body, x, rows, hooks, unroll=1, remat=None):
        """Folds ``body(x, [(layer, block), ...], row) -> (x, out)`` over the groups; what hooks put on tape comes out of the scan."""
        graphdef, params = nnx.split(self.blocks)
        tapes = [hook for hook in (hooks or {}).values() if isinstance(hook, Tape)]

        def one(x, row):
            group, params, row = row
            blocks = nnx.merge(graphdef, params)
            before = [tape.take() for tape in tapes]
            x, out = body(x, [(group * len(blocks) + i, block) for i, block in enumerate(blocks)], row)
            kept = [join(tape.take()) for tape in tapes]
            for tape, earlier in zip(tapes, before):
                tape.kept = earlier
            return x, (out, kept)

        if remat is not None:
            one = jax.checkpoint(one, policy=remat, prevent_cse=False)
        x, (out, kept) = jax.lax.scan(one, x, (jnp.arange(self.num_groups), params, rows), unroll=unroll)
        for tape, values in zip(tapes, kept):
            if values is not None:
                tape.kept.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), values))
        return x, out
