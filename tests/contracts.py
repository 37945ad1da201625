"""What every mechanism of the catalogue must satisfy, whoever wrote it.

A contract is a function of a :class:`Subject`, an example in one of its patterns. It raises :class:`Broken` where the example breaks it.
Calls of one shape are compiled once for all contracts, in float64 and with gradients; all else is done in NumPy, which compiles nothing.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from attnx.catalogue import PATTERNS, Case, Example
from attnx.core import fused

EXACT = 1e-10  # of the larger of 1 and the largest entry: what two ways of computing in float64 may differ by
LONG = 300  # tokens: enough for sums in 16 bits to go wrong
STEP = "step"  # the execution that reads token by token
HEAVY = ("pallas", "ring")  # executions that take long to trace: tried at one length
REFUSALS = (NotImplementedError, ValueError, TypeError)


class Broken(AssertionError):
    """A contract is broken."""


def require(holds, message):
    """Raises :class:`Broken` unless ``holds``."""
    if not holds:
        raise Broken(message)


class Subject:
    """An example in one of its patterns, with what has been compiled for it."""

    def __init__(self, example: Example, pattern: str | None):
        self.example, self.pattern = example, pattern or PATTERNS[0]
        self.claimed = pattern is not None
        self.first = self.pattern == (example.patterns or (self.pattern,))[0]
        # In patterns but the first, what is chosen by default stands for the executions: contract `executions` holds it against the definition.
        self.executions = tuple(name for index, name in enumerate(example.executions)
                                if (self.pattern == "causal self" if name == STEP else self.first or index == 0))
        self.definition = self.executions[0]
        self._jitted = functools.cache(self._jit)
        self._jitted_gradient = functools.cache(self._jit_gradient)
        self._made = functools.cache(lambda dtype, seed, sizes: example.arrays(self.pattern, seed=seed, dtype=dtype, **dict(sizes)))

    def arrays(self, dtype=jnp.float64, seed=0, **sizes):
        """Inputs; all may be seen unless a contract says otherwise."""
        inputs = dict(self._made(dtype, seed, tuple(sorted(sizes.items()))))
        if self.example.mask:
            inputs[self.example.mask] = np.ones_like(inputs[self.example.mask], bool)
        return inputs

    @functools.cached_property
    def long(self):
        """Long inputs in bfloat16, and the same numbers in float32."""
        sizes = {letter: LONG for letter in "ts" if any(letter in self.example.axes(name) for name in self.example.inputs) and letter not in self.example.sizes}
        inputs = self.arrays(jnp.bfloat16, **sizes)
        return inputs, jax.tree.map(lambda x: np.asarray(x).astype(np.float32) if _real(x) else x, inputs)

    def forward(self, inputs, execution=None):
        """The output, jitted, of a call that is not differentiated."""
        with _context(execution):
            return jax.device_get(self._jitted(execution)(inputs))

    def value(self, inputs, execution=None):
        """The output, by the call that also has the gradients, which is compiled anyway; but nobody differentiates what reads token by token."""
        return self.forward(inputs, execution) if execution == STEP else self.gradient(inputs, execution)[0]

    def gradient(self, inputs, execution=None):
        """The output, and the gradients of a random projection of it by all real inputs."""
        with _context(execution):
            return jax.device_get(self._jitted_gradient(execution)(inputs))

    def call(self, execution, inputs):
        """The call itself."""
        return self.example.call(Case(self.pattern, execution), **inputs)

    def _jit(self, execution):
        return jax.jit(functools.partial(self.call, execution))

    def _jit_gradient(self, execution):
        def loss(real, rest):
            out = self.call(execution, _join(real, rest))
            return jnp.vdot(out, _projection(out)), out

        def run(inputs):
            real, rest = _split(inputs)
            gradients, out = jax.grad(loss, has_aux=True)(real, rest)
            return out, gradients

        return jax.jit(run)

    def positions(self, axis):
        """For each input, where it has an axis ('t' and 's' are one in self-attention), or None."""
        same = "ts" if axis in "ts" and self.pattern.endswith("self") else axis
        return {name: [i for i, letter in enumerate(self.example.axes(name)) if letter in same] for name in self.example.inputs}

    def change(self, inputs, axis, chosen, keep=()):
        """``inputs`` with other numbers (of another seed) at the indices ``chosen`` (boolean) of an axis."""
        sizes = {letter: size for name in inputs if self.example.axes(name) for letter, size in zip(self.example.axes(name), inputs[name].shape)}
        others = self.arrays(seed=1, **sizes)
        changed = dict(inputs)
        for name, places in self.positions(axis).items():
            for place in places if name not in keep else ():
                where = chosen.reshape([-1 if i == place else 1 for i in range(changed[name].ndim)])
                changed[name] = np.where(where, others[name], changed[name])
        return changed


@contextlib.contextmanager
def _context(execution):
    """What an execution needs around it: kernels emulated, a mesh for a ring."""
    with contextlib.ExitStack() as stack:
        if execution == "pallas":
            stack.enter_context(fused.forced())
        if execution == "ring":
            stack.enter_context(jax.set_mesh(jax.make_mesh((2,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))))
        yield


def _real(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _projection(out):
    """Random numbers in the shape of an output."""
    return np.random.default_rng(9).standard_normal(out.shape).astype(out.dtype)


def _split(inputs):
    leaves, structure = jax.tree.flatten(inputs)
    real = {i: x for i, x in enumerate(leaves) if _real(x)}
    return real, ({i: x for i, x in enumerate(leaves) if not _real(x)}, structure)


def _join(real, rest):
    others, structure = rest
    return jax.tree.unflatten(structure, [(real | others)[i] for i in range(len(real) + len(others))])


def differ(a, b):
    """The largest difference of two trees of arrays, relative to the larger of 1 and the largest entry; infinite where one is not finite."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        require(x.shape == y.shape, f"shapes {x.shape} and {y.shape}")
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            return np.inf
        worst = max(worst, np.abs(x - y).max(initial=0) / max(1.0, np.abs(y).max(initial=0)))
    return worst


def finite(tree):
    """Whether all entries are finite."""
    return all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(tree))


# The contracts ------------------------------------------------------------------------------------------------------


def shapes_and_dtypes(subject):
    """The output has the declared axes and the dtype of the inputs."""
    for inputs, dtype in zip((subject.arrays(), *subject.long), (jnp.float64, jnp.bfloat16, jnp.float32)):
        out = (subject.value if dtype == jnp.float64 else subject.forward)(inputs, subject.definition)
        sizes = {letter: size for name in inputs if subject.example.axes(name) for letter, size in zip(subject.example.axes(name), inputs[name].shape)}
        require(len(out.shape) == len(subject.example.output), f"output {out.shape} for axes {subject.example.output!r}")
        require(all(sizes.get(letter, size) == size for letter, size in zip(subject.example.output, out.shape)),
                f"output {out.shape} for axes {subject.example.output!r} of sizes {sizes}")
        require(out.dtype == dtype, f"output {out.dtype} for inputs of {jnp.dtype(dtype)}")


def jit_is_eager(subject):
    """Compiled or not, the result is the same."""
    inputs = jax.tree.map(jnp.asarray, subject.arrays())
    error = differ(subject.value(inputs, subject.definition), subject.call(subject.definition, inputs))
    require(error < EXACT, f"jit and eager differ by {error:.1e}")


def gradients(subject):
    """Gradients are finite and those of the function: finite differences of float64 in a random direction agree."""
    inputs = subject.arrays()
    out, slopes = subject.gradient(inputs, subject.definition)
    require(finite(slopes), "a gradient is not finite")
    real, rest = _split(inputs)
    if not real:
        return
    random = np.random.default_rng(5)
    direction = {i: random.standard_normal(np.shape(x)) for i, x in real.items()}
    step = 1e-5
    ahead, behind = (subject.gradient(_join({i: np.asarray(x) + sign * step * direction[i] for i, x in real.items()}, rest), subject.definition)[0]
                     for sign in (1, -1))
    expected = np.vdot(ahead - behind, _projection(out)) / (2 * step)
    got = sum(np.vdot(slopes[i], direction[i]) for i in real)
    scale = np.sqrt(sum(np.vdot(x, x) for x in slopes.values())) + np.abs(expected)
    require(np.abs(got - expected) <= 1e-6 * np.maximum(scale, 1e-3), f"slope {got:.9g}, by finite differences {expected:.9g}")


def gradients_at_zero(subject):
    """At inputs of zeros, where norms and ratios are singular, output and gradients are finite."""
    inputs = {name: np.zeros_like(x) if subject.example.axes(name) and _real(x) else x for name, x in subject.arrays().items()}
    require(finite(subject.gradient(inputs, subject.definition)), "output or gradients are not finite where all inputs are zero")


def sixteen_bits(subject):
    """In bfloat16 the result is that of the rounded inputs to a few roundings: sums, statistics and states are kept wider."""
    inputs, wide = subject.long
    expected = np.asarray(subject.forward(wide, subject.definition), np.float64)
    for execution in dict.fromkeys((None, subject.definition)):
        got = np.asarray(subject.forward(inputs, execution), np.float64)
        error = np.abs(got - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-6)
        require(error < 2.0**-5, f"bfloat16 is off by {error:.1%} of the largest entry ({execution or 'by default'})")


def vmap(subject):
    """Mapped over, it is what it is for each."""
    both = [subject.arrays(seed=seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *both)
    got = jax.jit(jax.vmap(functools.partial(subject.call, None)))(stacked)
    error = differ(got, np.stack([subject.value(inputs, subject.definition) for inputs in both]))
    require(error < EXACT, f"vmap differs by {error:.1e}")


def batch_independence(subject):
    """What is in one row of the batch does not change another."""
    if "b" not in subject.example.output:
        return
    inputs = subject.arrays()
    second = np.arange(2) == 1
    out, other = (subject.value(x, subject.definition) for x in (inputs, subject.change(inputs, "b", second)))
    axis = subject.example.output.index("b")
    error = differ(np.take(other, 0, axis), np.take(out, 0, axis))
    require(error < EXACT, f"row 0 changes by {error:.1e} with row 1 of the batch")


def causality(subject):
    """A causal mechanism does not see the future, and sees the past; another sees both."""
    if not subject.claimed:
        return
    causal = subject.pattern.startswith("causal")
    inputs = subject.arrays()
    axis = subject.example.output.index("t")
    for execution in subject.executions:
        out = np.moveaxis(subject.value(inputs, execution), axis, 0)
        size = out.shape[0]
        length = max(inputs[name].shape[places[0]] for name, places in subject.positions("s").items() if places)
        for first in sorted({1, size // 2, size - 1} & set(range(1, length))):
            later = subject.change(inputs, "s", np.arange(length) >= first)
            if subject.pattern.endswith("cross"):
                later = subject.change(later, "t", np.arange(size) >= first)
            other = np.moveaxis(subject.value(later, execution), axis, 0)
            if causal:
                error = differ(other[:first], out[:first])
                require(error < EXACT, f"outputs before {first} change by {error:.1e} with what comes from there on ({execution})")
        first_key, last_key = (min(size, length) - 1, 0) if subject.example.local else (0, length - 1)
        last = subject.change(inputs, "s", np.arange(length) == last_key)
        other = np.moveaxis(subject.value(last, execution), axis, 0)
        if not causal:
            require(differ(other[:1], out[:1]) > 1e-6, f"not causal, but the first output ignores the last key ({execution})")
        kept = tuple(name for name, at in subject.positions("t").items() if at and subject.pattern.endswith("cross"))
        past = subject.change(inputs, "s", np.arange(length) == first_key, keep=kept)
        other = np.moveaxis(subject.value(past, execution), axis, 0)
        require(differ(other[min(size, length) - 1], out[min(size, length) - 1]) > 1e-9, f"the last output ignores the first key ({execution})")


def refusals(subject):
    """What is not claimed is refused: a pattern that the call can be asked for either is among its patterns or raises."""
    example = subject.example
    if not subject.claimed or subject.pattern != example.patterns[0]:
        return
    has_keys = any("s" in example.axes(name) for name in example.inputs)
    for pattern in set(PATTERNS) - set(example.patterns):
        crossed = pattern.endswith("cross")
        if crossed and not has_keys:
            continue
        case, inputs = Case(pattern, example.executions[0]), Subject(example, pattern).arrays()
        try:
            jax.eval_shape(lambda inputs: example.call(case, **inputs), inputs)
        except REFUSALS:
            continue
        other_kind = crossed != subject.pattern.endswith("cross")
        require(not (case.asked or other_kind), f"{pattern} is not among its patterns, but is not refused")


def mask_respect(subject):
    """What is masked does not matter, and where all is masked the output is zero (or what is declared), with finite gradients."""
    name = subject.example.mask
    if not name:
        return
    letter = subject.example.axes(name)[-1]
    inputs = subject.arrays()
    length = inputs[name].shape[-1]
    seen = np.arange(length) < max(length - 3, 1)
    inputs[name] = np.broadcast_to(seen, inputs[name].shape)
    axes = subject.example.output
    letters = "ts" if letter in "ts" and subject.pattern.endswith("self") else letter
    places = [i for i, axis in enumerate(axes) if axis in letters]
    for execution in subject.executions:
        if execution == STEP:
            continue
        out, other = (subject.value(x, execution) for x in (inputs, subject.change(inputs, letter, ~seen, keep=(name,))))
        for place in places:
            out, other = (np.compress(seen, x, axis=place) for x in (out, other))
        error = differ(other, out)
        require(error < EXACT, f"outputs change by {error:.1e} with what is masked ({execution})")
        nothing = {**inputs, name: np.zeros_like(inputs[name])}
        out, slopes = subject.gradient(nothing, execution)
        require(finite((out, slopes)), f"output or gradients are not finite where all is masked ({execution})")
        if subject.example.empty == "zero":
            require(not np.any(out), f"the output is not zero where all is masked ({execution})")


def executions(subject):
    """All executions agree with the definition, in value and gradients; so does whatever is chosen by default, in patterns but the first in value."""
    inputs = subject.arrays()
    expected = subject.gradient(inputs, subject.definition)
    for execution in dict.fromkeys((None, *subject.executions[1:])):
        differentiated = execution != STEP and (execution or subject.first)
        got, wanted = (subject.gradient(inputs, execution), expected) if differentiated else (subject.forward(inputs, execution), expected[0])
        error = differ(got, wanted)
        require(error < EXACT, f"{execution or 'the default'} differs from {subject.definition} by {error:.1e}")


def lengths(subject):
    """Other lengths, one among them, work and agree with the definition; what has no tokens has no lengths."""
    if not any(letter in subject.example.axes(name) for name in subject.example.inputs for letter in "ts"):
        return
    for length in subject.example.lengths:
        for queries, keys in {(length, length)} | ({(5, length)} if subject.pattern == "noncausal cross" else set()):
            inputs = subject.arrays(t=queries, s=keys)
            expected = subject.forward(inputs, subject.definition)
            for execution in dict.fromkeys((None, *(name for name in subject.executions[1:] if name not in HEAVY))):
                error = differ(subject.forward(inputs, execution), expected)
                require(error < EXACT, f"{execution or 'the default'} differs by {error:.1e} at {queries} queries and {keys} keys")


OF_PATTERNS = (gradients, causality, refusals, mask_respect, executions)
CONTRACTS = (shapes_and_dtypes, jit_is_eager, gradients_at_zero, sixteen_bits, vmap, batch_independence, *OF_PATTERNS, lengths)


def check(example: Example, pattern: str | None):
    """Holds an example in a pattern (None for one without) to the contracts: in its first to all, in others to those that depend on it.

    Raises:
      Broken: for the first that is broken, by name.
    """
    subject = Subject(example, pattern)
    with jax.enable_x64(True):
        for contract in CONTRACTS if pattern in (None, *example.patterns[:1]) else OF_PATTERNS:
            try:
                contract(subject)
            except Broken as broken:
                raise Broken(f"{contract.__name__}: {broken}") from None


def cases(entries):
    """(id, index of the example, pattern) of all that is to be checked."""
    return [(entry.id, index, pattern) for entry in entries for index, example in enumerate(entry.examples)
            for pattern in itertools.chain(example.patterns or (None,))]
