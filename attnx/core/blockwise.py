"""The ``blockwise`` execution: an XLA fold over key blocks in O(T) memory, on any backend.

A forward pass sweeps the tiles worth visiting query block by query block, a backward pass key block by key block. What is
folded comes from :mod:`attnx.core.operations`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from attnx.core.compat import vary, varying_axes
from attnx.core.program import Data, Program, partition
from attnx.core.tiling import (
    Tiling,
    Where,
    add_operand_block,
    add_rows_block,
    at_block,
    by_head,
    by_token,
    choose_sliding,
    choose_tiling,
    keys_block,
    map_operands,
    operand_block,
    over_lanes,
    pad_rows,
    put_token_rows_block,
    rows_block,
    sweep,
    token_rows_block,
    unpad_operand,
    without_padding,
)
from pallas_kernels import tile


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """Executes a program tile by tile on one device; static and hashable.

    Attributes:
      tiling: the blocks, and the tiles where no other are chosen by ``reach``.
      reach: how many positions before and after its own a query sees at the most, in a call of default positions: a block then visits a single tile.
    """

    program: Program
    tiling: Tiling
    reach: tuple[int, int] | None = None

    def maximum(self, x):
        """The largest entry over everything this execution holds (over all devices, where it holds several)."""
        return jnp.max(x, initial=0)

    def stored(self, x):
        """A result as it is kept: in the accumulator's dtype."""
        return x

    def fold_rows(self, data: Data, init, body, finish, rows=(), *, differentiable: bool = False):
        """Folds ``body`` over the keys of every query.

        Args:
          init: ``init(rows block) -> carry`` of one head's query block, a pytree of [bq, X].
          body: ``body(carry, q, k, v, rows, at, blocks, seed, masked) -> carry`` on one tile of one head.
          finish: ``finish(carry) -> result``, a pytree of [bq, X].
          rows: a pytree of [B, K, G, T, X], cut to the rows of the tile.
          differentiable: scan a static number of steps and recompute each in the backward pass, so that any derivative exists.

        Returns the results as [B, K, G, T, X].
        """
        program, (b, k, g, t, _) = self.program, data.query.shape
        axes = varying_axes(data, rows)
        data, rows = vary((data, rows), axes)
        tiling, data, todo = sweep(program, data, self.tiling, self.reach)
        rows, nq, chunks = pad_rows(rows, tiling), data.query.shape[3] // tiling.bq, k // tiling.lanes
        by_tokens = jax.tree.map(by_token, (data.query, rows))

        def place(n):
            return Where(n // (chunks * nq), n // nq % chunks, n % nq * tiling.bq, 0)

        def block(n):
            where = place(n)
            order, full, active = todo.of(where.b, where.c, n % nq)
            q, mine = jax.tree.map(lambda x: token_rows_block(x, where, tiling, g), by_tokens)

            def visit(slot, carry, masked):
                here = where._replace(key=order[slot])
                keys, v, positions, blocks = load(program, data, here, tiling)
                one = lambda q, k, v, state, at, blocks: body(state[0], q, k, v, state[1], at, blocks, data.seed, masked)
                return over_lanes(one, program, data, here, tiling)(q, keys, v, (carry, mine), positions, blocks)

            carry = vary(jax.vmap(jax.vmap(lambda _, rows: init(rows)))(jnp.zeros((tiling.lanes, g)), mine), axes)
            if differentiable:
                def step(carry, slot):
                    kind = (slot >= full).astype(jnp.int32) + (slot >= active)
                    branches = [partial(visit, slot, masked=False), partial(visit, slot, masked=True), lambda c: c]
                    return lax.switch(kind, branches, carry), None
                carry, _ = lax.scan(jax.checkpoint(step), carry, jnp.arange(order.size, dtype=jnp.int32))
            else:
                carry = lax.fori_loop(0, full, partial(visit, masked=False), carry)
                carry = lax.fori_loop(full, active, partial(visit, masked=True), carry)
            return jax.vmap(jax.vmap(finish))(carry)

        count = b * chunks * nq
        if differentiable:
            stacked = lax.map(jax.checkpoint(block), jnp.arange(count, dtype=jnp.int32))

            def assemble(x):
                x = x.reshape(b, chunks, nq, tiling.lanes, g, tiling.bq, x.shape[-1])
                return x.transpose(0, 1, 3, 4, 2, 5, 6).reshape(b, k, g, nq * tiling.bq, x.shape[-1])

            results = jax.tree.map(assemble, stacked)
        else:
            def put(n, results):
                return jax.tree.map(lambda total, x: put_token_rows_block(total, x, place(n), tiling), results, block(n))

            like = jax.eval_shape(block, 0)
            results = jax.tree.map(lambda x: jnp.zeros((b, nq * tiling.bq, k * g, x.shape[-1]), x.dtype), like)
            results = jax.tree.map(lambda x: by_head(x, g), lax.fori_loop(0, count, put, vary(results, axes)))
        return jax.tree.map(lambda x: x[:, :, :, :t], results)

    def fold_keys(self, data: Data, body, rows, gradient_of):
        """Sums ``body(q, k, v, rows, at, blocks, seed, masked) -> (dq, dk, dv, drows, dblocks)`` over all tiles.

        ``gradient_of`` are the rows that ``drows`` are the gradients of. Visits the query blocks of each key block, so dk and dv stay
        in the carry and only row gradients are read and written per tile. Returns gradients shaped like query, key, value,
        ``gradient_of`` and the inexact operands, in the accumulator's dtype.
        """
        program = self.program
        dtype = tile.accumulator_dtype(data.query.dtype)
        b, k, g, t, h = data.query.shape
        s, unpadded, axes = data.key.shape[2], partition(data.operands)[0], varying_axes(data, rows)
        data, rows = vary((data, rows), axes)  # or the tiles' own gradients would be summed over devices, tile by tile
        rows, gradient_of = pad_rows(rows, self.tiling), pad_rows(gradient_of, self.tiling)
        tiling, data, todo = sweep(program, data, self.tiling, self.reach, by_key=True)
        nk, chunks = data.key.shape[2] // tiling.bk, k // tiling.lanes
        operands, specs = partition(data.operands)[0], program.inexact_specs(data.operands)

        def step(carry, n):
            where = Where(n // (chunks * nk), n // nk % chunks, 0, n % nk * tiling.bk)
            order, full, active = todo.of(where.b, where.c, n % nk)

            def visit(slot, carry, masked):
                query_side, key_side, operand_side = carry
                here = where._replace(query=order[slot])
                keys, v, positions, blocks = load(program, data, here, tiling)
                q, mine = jax.tree.map(lambda x: rows_block(x, here, tiling), (data.query, rows))
                one = lambda q, k, v, rows, at, blocks: body(q, k, v, rows, at, blocks, data.seed, masked)
                dq, dk, dv, drows, dblocks = over_lanes(one, program, data, here, tiling)(q, keys, v, mine, positions, blocks)
                query_side = jax.tree.map(lambda total, x: add_rows_block(total, x, here, tiling), query_side, (dq, drows))
                key_side = jax.tree.map(lambda total, x: total + x.sum(1), key_side, (dk, dv))
                operand_side = [add_operand_block(program, total, spec, x, positions, here, tiling)
                                for total, spec, x in zip(operand_side, specs, dblocks)]
                return query_side, key_side, operand_side

            query_side, operand_side = carry
            fresh = jax.tree.map(lambda x: jnp.zeros((tiling.lanes, tiling.bk, x.shape[-1]), dtype), (data.key, data.value))
            carry = (query_side, vary(fresh, axes), operand_side)
            carry = lax.fori_loop(0, full, partial(visit, masked=False), carry)
            query_side, key_side, operand_side = lax.fori_loop(full, active, partial(visit, masked=True), carry)
            return (query_side, operand_side), key_side

        zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, dtype))
        start = vary((zeros((data.query, gradient_of)), zeros(operands)), axes)
        ((dq, drows), doperands), (dk, dv) = lax.scan(step, start, jnp.arange(b * chunks * nk, dtype=jnp.int32))

        def assemble(x):
            x = x.reshape(b, chunks, nk, tiling.lanes, tiling.bk, x.shape[-1])
            return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, k, nk * tiling.bk, x.shape[-1])[:, :, :s]

        dk, dv = jax.tree.map(assemble, (dk, dv))
        dq, drows = jax.tree.map(lambda x: x[:, :, :, :t], (dq, drows))
        return dq, dk, dv, drows, [unpad_operand(*args, tiling) for args in zip(doperands, unpadded, specs)]


def load(program: Program, data: Data, where: Where, tiling: Tiling):
    """What a tile function wants at ``where`` (padded data) besides queries: k, v, positions, blocks."""
    positions = at_block(data, where, tiling)
    blocks = map_operands(lambda x, spec: operand_block(program, x, spec, positions, where, tiling), data.operands, program.specs)
    v = None if data.value is None else keys_block(data.value, where, tiling)
    return keys_block(data.key, where, tiling), v, positions, blocks


def choose_blockwise(program: Program, data: Data, block_sizes=None) -> Blockwise:
    """The executor of a call."""
    sliding = choose_sliding(program, data) if block_sizes is None else None
    tiling, reach = sliding or (choose_tiling(program, data, block_sizes), None)
    return Blockwise(without_padding(program, tiling), tiling, reach)
