"""The ``ring`` execution: the sequence lives on several devices, and key blocks travel around them.

Each device folds its queries against the keys it holds, then passes keys, values and whatever varies along keys to its neighbour: the
fold of :mod:`attnx.core.blockwise` over a carry that stays, with transfers that overlap it. Memory a device is O(T / P). The backward pass
does the same once more, the gradients of keys travelling with them and ending at home.

Liu, Zaharia, Abbeel: "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023, arXiv 2310.01889). Under a causal mask device 0
would have nothing to do most of the time, so the sequence is dealt out in a zigzag first: of 2P chunks device d holds chunks
d and 2P-1-d (as in Brandon et al.: "Striped Attention", 2023, arXiv 2311.09431, in coarser stripes that keep tiles full or empty).
Parts see logical positions, so nothing else knows. Masks of a limited span stop the ring as soon as no device can see what would
come next.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from attnx.core.blockwise import Blockwise
from attnx.core.program import Data, Program, partition
from attnx.core.tiling import Tiling, check_products, map_operands, pad, widen


@dataclasses.dataclass(frozen=True)
class Ring:
    """Executes a program over a mesh axis; static and hashable. Takes whole arrays, shards them, and returns whole arrays."""

    program: Program
    tiling: Tiling
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
    axis: str | None  # None where only batch and heads are sharded
    batch_axes: tuple[str, ...]
    head_axes: tuple[str, ...]
    zigzag: bool
    steps: int  # how many devices' keys each device sees

    @property
    def devices(self) -> int:
        """P, the devices around the ring."""
        return 1 if self.axis is None else self.mesh.shape[self.axis]

    def maximum(self, x):
        """The largest entry over all devices."""
        return jnp.max(x, initial=0)

    def stored(self, x):
        """A result as it is kept: in the accumulator's dtype."""
        return x

    # Whole arrays to shards and back

    def _specs(self, data: Data, rows):
        b, h = self.batch_axes or None, self.head_axes or None
        rows_spec = PartitionSpec(b, h, None, self.axis, None)
        keys_spec = PartitionSpec(b, h, self.axis, None)

        def operand(x, spec):
            position = [None] if spec.offset else [self.axis if spec.query else None, self.axis if spec.key and not spec.query else None]
            return PartitionSpec(b if spec.batch else None, h if spec.kv else None, None, *position)

        positions = lambda p: PartitionSpec(b if p.shape[0] > 1 else None, self.axis)
        specs = Data(rows_spec, keys_spec, None if data.value is None else keys_spec, map_operands(operand, data.operands, self.program.specs),
                     positions(data.query_positions), positions(data.key_positions), PartitionSpec(), PartitionSpec())
        return specs, jax.tree.map(lambda _: rows_spec, rows)

    def _run(self, local, data: Data, rows, out_specs):
        """``local(data, rows)`` on every device's shard, in ring order, the call padded to whole chunks."""
        chunks = 2 * self.devices if self.zigzag else self.devices
        data = pad(self.program, data, chunks, chunks)
        rows = jax.tree.map(lambda x: widen(x, 3, -x.shape[3] % chunks), rows)
        specs = self._specs(data, rows)

        def shard(data, rows):
            index = lambda axes: sum(lax.axis_index(a) * math.prod(self.mesh.shape[a] for a in axes[i + 1:]) for i, a in enumerate(axes))
            origin = jnp.stack([index(self.batch_axes) * data.query.shape[0], index(self.head_axes) * data.query.shape[1]])
            return local(data._replace(origin=jnp.asarray(origin, jnp.int32)), rows)

        return jax.shard_map(shard, mesh=self.mesh, in_specs=specs, out_specs=out_specs(*specs), check_vma=False)(data, rows)

    # The zigzag: two permutations of half shards, for chunk d and chunk 2P-1-d are of different parity

    def _deal(self, x, axis, *, back=False):
        if not self.zigzag:
            return x
        p, me = self.devices, lax.axis_index(self.axis)
        home = lambda c: min(c, 2 * p - 1 - c)  # the device that folds chunk c
        even, odd = [(c // 2, home(c)) for c in range(0, 2 * p, 2)], [(c // 2, home(c)) for c in range(1, 2 * p, 2)]
        swap = me % 2 == 1  # on odd devices chunk d, which comes first, is the odd one
        first, second = jnp.split(x, 2, axis=axis)
        order = lambda a, b: (jnp.where(swap, b, a), jnp.where(swap, a, b))
        if back:
            first, second = order(first, second)
            even, odd = ([(b, a) for a, b in pairs] for pairs in (even, odd))
        first, second = lax.ppermute(first, self.axis, even), lax.ppermute(second, self.axis, odd)
        return jnp.concatenate((first, second) if back else order(first, second), axis=axis)

    def _deal_data(self, data: Data) -> Data:
        deal = self._deal

        def operand(x, spec):
            x = deal(x, 3) if spec.query else x
            return deal(x, 4) if spec.key and not spec.query else x

        return data._replace(query=deal(data.query, 3), key=deal(data.key, 2), value=None if data.value is None else deal(data.value, 2),
                             operands=map_operands(operand, data.operands, self.program.specs),
                             query_positions=deal(data.query_positions, 1), key_positions=deal(data.key_positions, 1))

    # What travels

    def _travels(self, spec):
        return spec.key and not spec.query

    def _split(self, data: Data):
        """What travels with the keys, and how to put it (with its columns of two-axis operands) back."""
        leaves, tree = jax.tree.flatten(data.operands)
        specs = self.program.flat_specs
        moving = (data.key, data.value, data.key_positions, [x for x, s in zip(leaves, specs) if self._travels(s)])

        def join(moving, source):
            key, value, positions, columns = moving
            columns, size = iter(columns), key.shape[2]
            operands = [next(columns) if self._travels(s) else self._columns(x, s, source, size) for x, s in zip(leaves, specs)]
            return data._replace(key=key, value=value, key_positions=positions, operands=jax.tree.unflatten(tree, operands))

        return moving, join

    def _starts(self, source, size):
        """Where the columns held by device ``source`` begin, and how many there are at each place."""
        if not self.zigzag:
            return [source * size], size
        half = size // 2
        return [source * half, (2 * self.devices - 1 - source) * half], half

    def _columns(self, x, spec, source, size):
        if not (spec.query and spec.key):
            return x
        starts, width = self._starts(source, size)
        return jnp.concatenate([lax.dynamic_slice_in_dim(x, start, width, axis=4) for start in starts], axis=4)

    def _add_columns(self, total, x, source, size):
        starts, width = self._starts(source, size)
        for start, part in zip(starts, jnp.split(x, len(starts), axis=4)):
            old = lax.dynamic_slice_in_dim(total, start, width, axis=4)
            total = lax.dynamic_update_slice_in_dim(total, old + part, start, axis=4)
        return total

    def _pass(self, tree, by=1):
        p = self.devices
        if p == 1:
            return tree
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, [(d, (d + by) % p) for d in range(p)]), tree)

    def _source(self, step):
        return 0 if self.devices == 1 else (lax.axis_index(self.axis) - step) % self.devices

    # The two sweeps

    def fold_rows(self, data: Data, init, body, finish, rows=(), *, differentiable: bool = False):
        """As :meth:`attnx.core.blockwise.Blockwise.fold_rows`, over all devices."""
        if differentiable:
            raise NotImplementedError("implementation='ring' has first derivatives only; use 'blockwise' or 'reference' for derivatives of derivatives")
        on_device = Blockwise(self.program, self.tiling)

        def local(data, rows):
            data, rows = self._deal_data(data), jax.tree.map(lambda x: self._deal(x, 3), rows)
            moving, join = self._split(data)
            resume = lambda carry, q, k, v, both, at, blocks, seed, masked: body(carry, q, k, v, both[1], at, blocks, seed, masked)

            def turn(step, state):
                carry, moving = state
                coming = self._pass(moving)  # independent of the fold below, so it overlaps
                carry = on_device.fold_rows(join(moving, self._source(step)), lambda both: both[0], resume, lambda c: c, (carry, rows))
                return carry, coming

            b, k, g, t, _ = data.query.shape
            whole = lambda x: jnp.broadcast_to(x[:1], (t, x.shape[-1]))
            each_head = lambda function: jax.vmap(jax.vmap(jax.vmap(function)))
            carry = each_head(lambda _: jax.tree.map(whole, init(None)))(jnp.zeros((b, k, g)))
            carry, _ = lax.fori_loop(0, self.steps, turn, (carry, moving))
            return jax.tree.map(lambda x: self._deal(x, 3, back=True), each_head(finish)(carry))

        t = data.query.shape[3]
        out = self._run(local, data, rows, lambda specs, _: specs.query)
        return jax.tree.map(lambda x: x[:, :, :, :t], out)

    def fold_keys(self, data: Data, body, rows, gradient_of):
        """As :meth:`attnx.core.blockwise.Blockwise.fold_keys`, over all devices."""
        on_device = Blockwise(self.program, self.tiling)
        specs = self.program.inexact_specs(data.operands)
        everywhere = (*([] if self.axis is None else [self.axis]), *self.batch_axes, *self.head_axes)

        def shared_over(spec):
            """Mesh axes over which an operand's gradient is a sum, because every device reads the same entries."""
            kept = {self.axis: spec.query or spec.key, **{a: spec.batch for a in self.batch_axes}, **{a: spec.kv for a in self.head_axes}}
            return tuple(a for a in everywhere if not kept[a])

        def local(data, both):
            data = self._deal_data(data)
            rows, gradient_of = jax.tree.map(lambda x: self._deal(x, 3), both)
            moving, join = self._split(data)
            size = data.key.shape[2]

            def turn(step, state):
                (dq, drows, staying), (moving, travelling) = state
                source = self._source(step)
                more = on_device.fold_keys(join(moving, source), body, rows, gradient_of)
                dq, drows = jax.tree.map(jnp.add, (dq, drows), (more[0], more[3]))
                columns = [x for x, s in zip(more[4], specs) if self._travels(s)]
                travelling = jax.tree.map(jnp.add, travelling, (more[1], more[2], columns))
                rest = [(x, s) for x, s in zip(more[4], specs) if not self._travels(s)]
                staying = [self._add_columns(total, x, source, size) if s.query and s.key else total + x for total, (x, s) in zip(staying, rest)]
                return (dq, drows, staying), self._pass((moving, travelling))

            dtype = jnp.promote_types(data.query.dtype, jnp.float32)
            zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, dtype))
            operands = partition(data.operands)[0]
            staying = zeros([x for x, s in zip(operands, specs) if not self._travels(s)])
            travelling = zeros((data.key, data.value, [x for x, s in zip(operands, specs) if self._travels(s)]))
            state = ((zeros(data.query), zeros(gradient_of), staying), (moving, travelling))
            (dq, drows, staying), (_, travelling) = lax.fori_loop(0, self.steps, turn, state)
            dk, dv, columns = self._pass(travelling, by=-self.steps)  # home
            dq, drows = jax.tree.map(lambda x: self._deal(x, 3, back=True), (dq, drows))
            dk, dv = jax.tree.map(lambda x: self._deal(x, 2, back=True), (dk, dv))
            staying, columns, operands = iter(staying), iter(columns), []
            for spec in specs:
                x = next(columns) if self._travels(spec) else next(staying)
                x = self._deal(x, 3, back=True) if spec.query else x
                x = self._deal(x, 4, back=True) if self._travels(spec) else x
                operands.append(lax.psum(x, shared_over(spec)) if shared_over(spec) else x)
            return dq, dk, dv, drows, operands

        def out_specs(specs_in, _):
            flat = jax.tree.leaves(specs_in.operands, is_leaf=lambda x: isinstance(x, PartitionSpec))
            inexact = [spec for x, spec in zip(jax.tree.leaves(data.operands), flat) if jnp.issubdtype(x.dtype, jnp.inexact)]
            return specs_in.query, specs_in.key, specs_in.value, jax.tree.map(lambda _: specs_in.query, gradient_of), inexact

        t, s = data.query.shape[3], data.key.shape[2]
        dq, dk, dv, drows, operands = self._run(local, data, (rows, gradient_of), out_specs)
        dq, drows = jax.tree.map(lambda x: x[:, :, :, :t], (dq, drows))
        dk, dv = jax.tree.map(lambda x: x[:, :, :s], (dk, dv))
        trim = lambda x, like: x[tuple(slice(n) for n in like.shape)]
        return dq, dk, dv, drows, [trim(x, like) for x, like in zip(operands, partition(data.operands)[0])]


def mesh_in_context():
    """The mesh over which a call ought to be sharded by itself: the one in context, where it is left to the compiler and has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = not mesh.empty and all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    return mesh if automatic and mesh.size > 1 else None


def usable_axes(mesh, axes, size: int) -> tuple[str, ...]:
    """Those of the mesh axes that have more than one device and, together, divide ``size``."""
    kept: list[str] = []
    for axis in axes:
        devices = math.prod(mesh.shape[a] for a in (*kept, axis)) if axis in mesh.shape else 1
        if axis in mesh.shape and mesh.shape[axis] > 1 and size % devices == 0:
            kept.append(axis)
    return tuple(kept)


def choose_ring(program: Program, data: Data, tiling: Tiling, mesh=None, axis: str | None = "sequence", batch_axes=("data", "fsdp"), head_axes=("tensor",),
                zigzag: bool | None = None) -> Ring:
    """The ring for a call on a mesh (the one in context by default); axes that the mesh lacks or the call does not divide are left out."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if axis is not None and axis not in mesh.shape:
        raise ValueError(f"axis_name: expected an axis of the mesh (one in context by jax.set_mesh, or mesh=...), got {axis!r} and a mesh with axes "
                         f"{tuple(mesh.shape)}")
    p = 1 if axis is None else mesh.shape[axis]

    span = (None, None) if program.parts.mask is None else program.parts.mask.span()
    if zigzag is None:  # worth it when early queries see less than late ones
        zigzag = p > 1 and program.parts.mask is not None and span[0] is None
    t, s = data.query.shape[3], data.key.shape[2]
    chunks = 2 * p if zigzag else p
    bq, bk = (min(size, -(-length // chunks)) for size, length in ((tiling.bq, t), (tiling.bk, s)))
    check_products(program, data, tuple(-(-length // chunks) for length in (t, s)) if p > 1 else (bq, bk), "mesh")
    aligned = all(-(-length // chunks) % block == 0 for block, length in ((bq, t), (bk, s)))
    program = dataclasses.replace(program, contiguous=program.contiguous and (aligned or not zigzag))
    steps = p
    if program.contiguous and not zigzag and t == s and span[0] is not None and span[1] == 0:
        steps = min(p, 1 - (-span[0] // -(-s // p)))
    return Ring(program, Tiling(bq, bk, 1), mesh, axis, usable_axes(mesh, batch_axes, data.query.shape[0]),
                usable_axes(mesh, head_axes, data.query.shape[1]), zigzag, steps)
