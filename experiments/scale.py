"""Compiles one training step of a large decoder at a long context for a TPU pod, without one, and reports memory, work and transfers."""

import dataclasses
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from attnx.cli import UsageError
from experiments.options import parse
from experiments.tpu import ENVIRONMENT

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles, for a TPU topology that need not be there, the training step of a decoder at a long context, with softmax around a ring and
    with a linear mechanism whose states are passed on. Needs libtpu (pip install libtpu); one compilation takes a minute or so.
    """

    topology: str = "v5p:4x4x8"
    """Chips and their shape, as JAX names them; the default is 128 chips."""
    context: int = 1_048_576
    """Tokens of the one sequence in a batch."""
    sequence: int = 32
    """Devices over which the sequence is cut."""
    tensor: int = 4
    """Devices over which heads and hidden sizes are cut."""
    features: int = 2048
    """Size of the residual stream."""
    layers: int = 20
    """Blocks; with the other defaults about a billion parameters."""
    heads: int = 16
    """Query heads."""
    kv_heads: int = 8
    """Key and value heads."""
    vocabulary: int = 32768
    """Tokens known."""
    limit: float = 95.0
    """Memory of a chip in GB, to compare with."""
    out: Path = Path("runs/scale")
    """Folder of the results."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``scale``."""
    options = parse(Options, program, arguments)
    console = Console()
    mesh = _mesh(options)
    rows = []
    for name in ("ring softmax", "linear"):
        with console.status(f"compiling {name} for {mesh.size} chips of {options.topology}"):
            rows.append(measure(name, options, mesh))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scale.json").write_text(json.dumps({"options": json.loads(json.dumps(dataclasses.asdict(options), default=str)), "programs": rows}, indent=2))
    console.print(_table(rows, options, mesh.size))
    return 0


def _mesh(options):
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jax.experimental import topologies

    from attnx import training

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    except Exception as error:  # libtpu says what it could not do in exceptions of many kinds
        raise UsageError(f"cannot compile for {options.topology}: {str(error).splitlines()[0]}; is libtpu installed?") from error
    rest, odd = divmod(len(devices), options.sequence * options.tensor)
    if odd:
        raise UsageError(f"--sequence times --tensor: expected a divisor of the {len(devices)} chips, got {options.sequence * options.tensor}")
    return training.make_mesh(fsdp=rest, sequence=options.sequence, tensor=options.tensor, devices=devices)


def measure(name: str, options: Options, mesh) -> dict[str, Any]:
    """Compiles the step with one mechanism; bytes are those of a chip."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import attnx
    from attnx import training
    from attnx.models import Decoder, TransformerConfig

    config = TransformerConfig(vocab_size=options.vocabulary, features=options.features, num_layers=options.layers, num_heads=options.heads,
                               num_kv_heads=options.kv_heads, dtype=jnp.bfloat16, remat="nothing_saveable")
    decays = jnp.log1p(-(2.0 ** -jnp.linspace(5, 12, options.kv_heads)))
    mechanism = attnx.pairs(mask=attnx.masks.causal()) if name == "ring softmax" else attnx.recurrent(log_decay=decays)
    graph, _, rest = nnx.split(nnx.eval_shape(lambda: Decoder(config, mechanism, rngs=nnx.Rngs(0))), nnx.Param, ...)
    rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)
    optimizer = optax.adamw(3e-4)

    def loss(params, batch, key):
        logits = nnx.merge(graph, params, rest)(batch["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).sum(), batch["targets"].size

    def make():
        params = nnx.split(Decoder(config, mechanism, rngs=nnx.Rngs(0)), nnx.Param, ...)[1]
        return training.init_state(params, optimizer, jax.random.key(0))

    state = jax.eval_shape(make)
    tokens = jax.ShapeDtypeStruct((mesh.shape["fsdp"], options.context), jnp.int32)
    placed = jax.NamedSharding(mesh, jax.P("fsdp", "sequence"))
    with training.use(mesh):
        step = training.make_train_step(loss, optimizer, shardings=(training.shardings(mesh, state), placed))
        lowered = step.trace(state, {"tokens": tokens, "targets": tokens}).lower(lowering_platforms=("tpu",))
        with tempfile.TemporaryDirectory() as folder:  # these executables cannot always print themselves, but the compiler can
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            text = max(Path(folder).glob("*.after_optimizations.txt"), key=lambda file: file.stat().st_size).read_text()
    memory = compiled.memory_analysis()
    resident = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    attended = options.context**2 / 2 * 2 * config.features if name == "ring softmax" else 0  # multiply-adds of scores and values in a layer
    flops = 3 * (2 * parameters * options.context + 2 * attended * options.layers) * mesh.shape["fsdp"] / mesh.size
    return {"mechanism": name, "parameters": parameters, "resident_bytes": resident, "scratch_bytes": memory.temp_size_in_bytes,
            "flops": flops, "collectives": collectives(text), "gathers_the_sequence": gathers(text, options.context)}


def collectives(text: str) -> dict[str, dict[str, float]]:
    """Of an optimised program: for each kind of collective how often it runs, and the bytes that it produces on a device.

    Loops count as often as they run, where the program says how often that is.
    """
    bodies, name = {}, ""
    for line in text.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if opened:
            name = opened[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M)
    counts, sizes = Counter(), Counter()

    def trips(line):
        """How often a while loop runs: as the compiler notes, or as the one constant that its condition compares with; 1 where the data decide."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        condition = re.search(r"condition=%?([\w.-]+)", line)
        if known or not condition:
            return int(known[1]) if known else 1
        lines = list(bodies.get(condition[1], ()))
        for called in re.findall(r"calls=%?([\w.-]+)", "\n".join(lines)):
            lines += bodies.get(called, ())
        bounds = {int(n) for n in re.findall(r"s32\[\](?:\S*)? constant\((\d+)\)", "\n".join(lines))}
        return bounds.pop() if len(bounds) == 1 else 1

    def walk(name, times):
        for line in bodies.get(name, ()):
            for kind in COLLECTIVES:
                if re.search(rf" {kind}(-start)?\(", line):
                    counts[kind] += times
                    sizes[kind] += times * _bytes(line.split(f" {kind}")[0])
            for role, called in re.findall(r"(body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", line):
                walk(called, times * (trips(line) if role == "body" else 1))
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for called in branches.split(","):
                    walk(called.strip(" %"), times)

    walk(entry[1] if entry else "", 1)
    return {kind: {"count": counts[kind], "bytes": sizes[kind]} for kind in COLLECTIVES if counts[kind]}


_WIDTH = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}


def _shapes(text):
    return [(kind, [int(n) for n in dims.split(",") if n]) for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text) if kind in _WIDTH]


def _bytes(text):
    """Bytes of the largest array in the result of an instruction; asynchronous ones carry their operands along."""
    return max((_WIDTH[kind] * math.prod(dims) for kind, dims in _shapes(text.split(" = ")[-1])), default=0)


def gathers(text: str, context: int) -> list[str]:
    """The all-gathers of a program whose result holds an axis as long as the whole context, which no device should have."""
    lines = [line for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    return [line.strip()[:200] for line in lines if any(context in dims for _, dims in _shapes(line.split(" all-gather")[0]))]


def _table(rows, options, chips):
    table = Table(title=f"One training step on {chips} chips of {options.topology}, {options.context:,} tokens of context; figures of one chip", title_justify="left")
    for name in ("", *(row["mechanism"] for row in rows)):
        table.add_column(name, justify="right" if name else "left")
    total = lambda row: (row["resident_bytes"] + row["scratch_bytes"]) / 1e9
    lines = {"parameters of the model": lambda row: f"{row['parameters'] / 1e9:.2f} G",
             "parameters, optimiser, batch": lambda row: f"{row['resident_bytes'] / 1e9:.2f} GB", "scratch": lambda row: f"{row['scratch_bytes'] / 1e9:.2f} GB",
             f"fits {options.limit:g} GB": lambda row: "yes" if total(row) <= options.limit else "no",
             "FLOPs of model and attention": lambda row: f"{row['flops']:.3g}",
             **{kind: lambda row, kind=kind: _moved(row["collectives"].get(kind)) for kind in COLLECTIVES},
             "gathers the sequence": lambda row: "yes" if row["gathers_the_sequence"] else "no"}
    for name, cell in lines.items():
        table.add_row(name, *map(cell, rows))
    return table


def _moved(each):
    return f"{each['count']:,} x, {each['bytes'] / 1e9:.3g} GB" if each else "none"
