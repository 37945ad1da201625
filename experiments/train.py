"""Trains a language model with one mechanism, of any size, on one device or many."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from attnx import training
from attnx.cli import UsageError
from experiments.comparison import draw_training
from experiments.options import parse
from experiments.progress import Meter
from experiments.run import Recipe, Run


@dataclasses.dataclass(frozen=True)
class Options(Recipe):
    """Trains a decoder of bytes with one attention mechanism. Checkpoints are complete or not there at all; stopped at any moment and called
    again, the command goes on from the last and takes the same steps as if it had not been stopped. `training.png` in the folder of the run
    shows how far it is.

    On several devices say how to use them: `--mesh-data 4 --mesh-tensor 2` on eight. On several hosts run the same command on each, with
    `--distributed`.
    """

    mechanism: str = "softmax"
    """The mechanism, by name; module:function names your own, a function (length, heads)."""
    out: Path = Path("runs/train")
    """Folder of the run."""
    mesh_data: int = 1
    """Devices that share each batch."""
    mesh_fsdp: int = 1
    """Devices over which batches and parameters are cut."""
    mesh_sequence: int = 1
    """Devices over which sequences are cut."""
    mesh_tensor: int = 1
    """Devices over which heads and hidden sizes are cut."""
    distributed: bool = False
    """One of several processes, which find each other as SLURM or the cloud says."""
    tensorboard: bool = False
    """Write event files for TensorBoard too (needs tensorboardX)."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``train``."""
    options = parse(Options, program, arguments)
    if options.distributed:
        jax.distributed.initialize()
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)})
    console = Console(quiet=jax.process_index() != 0)
    mesh = _mesh(options)
    run = Run(options.out, options.mechanism, recipe, tensorboard=options.tensorboard)
    train, held = training.read(options.data).split()
    try:
        prepared = run.prepare(mesh)
    except ValueError as error:
        raise UsageError(str(error)) from error
    run.claim()
    with Meter(recipe.steps, console) as meter:
        def report(step, values):
            if not values:
                meter.skip(step)
                return
            meter.at(step, f"step {step} of {recipe.steps}, {values['loss'] / np.log(2):.3f} bits per byte")
            if jax.process_index() == 0 and (step % recipe.save_every == 0 or step == recipe.steps):
                draw_training(run.name, run.metrics.read(), run.folder / "training.png")

        params = run.train(prepared, train, report=report, notify=lambda message: console.print(message, highlight=False))
    spans = training.spans(held, recipe.length, per_file=8)
    bits = run.model.evaluate(params, spans)
    console.print(f"held-out text: {bits[spans.valid].mean():.3f} bits per byte\ntry: attnx generate {run.folder}", highlight=False)
    return 0


def _mesh(options: Options) -> jax.sharding.Mesh | None:
    sizes = (options.mesh_data, options.mesh_fsdp, options.mesh_sequence, options.mesh_tensor)
    if sizes == (1, 1, 1, 1) and jax.process_count() == 1:
        return None
    try:
        return training.make_mesh(*sizes)
    except ValueError as error:
        raise UsageError(str(error)) from error
