"""A training run in a folder: its options, its checkpoints, its metrics; made, resumed or read."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from attnx import training
from attnx.cli import UsageError
from experiments.language_model import LanguageModel, ModelOptions
from experiments.mechanisms import mechanism


@dataclasses.dataclass(frozen=True)
class Recipe(ModelOptions):
    """A decoder and how it is trained."""

    data: str | None = None
    """Text to train on: a folder or a file. By default the source of the running Python's standard library."""
    length: int = 128
    """Tokens (bytes) that the model reads at once."""
    batch: int = 4
    """Sequences in a batch."""
    accumulate: int = 1
    """Parts into which a batch is cut to be evaluated one after another, in less memory."""
    separate: bool = False
    """Keep files that share a sequence from seeing each other."""
    steps: int = 2700
    """Number of updates."""
    learning_rate: float = 0.014
    """Peak rate of Muon, which trains the matrices inside the blocks."""
    adam_learning_rate: float = 0.015
    """Peak rate of Adam, which trains the rest."""
    warmup: int = 20
    """Updates over which the rates rise."""
    decay: float = 0.4
    """Share of the updates, at the end, over which the rates fall to zero."""
    seed: int = 0
    """Of initial parameters and of the order of the data."""
    save_every: int = 200
    """Updates from one checkpoint to the next."""


class Prepared(NamedTuple):
    """What a run needs to begin.

    Attributes:
      step: the compiled training step.
      state: the initial state.
      place: puts a batch on the devices.
      share: ``{process_index, process_count}``, which part of each batch to read.
    """

    step: jax.stages.Compiled
    state: training.TrainState
    place: Callable[[Any], Any]
    share: dict[str, int]


class Run:
    """A recipe and a mechanism in a folder.

    Args:
      folder: of the run.
      name: of the mechanism, see :func:`experiments.mechanisms.mechanism`.
      recipe: the rest.
      tensorboard: whether its metrics are written for TensorBoard too.

    Raises:
      UsageError: for options that no run can have.
    """

    def __init__(self, folder: str | os.PathLike, name: str, recipe: Recipe, *, tensorboard: bool = False):
        self.folder, self.name, self.recipe = Path(folder), name, recipe
        _check(recipe)
        try:
            self.model = LanguageModel(recipe, mechanism(name, recipe.length, recipe.kv_heads or recipe.heads), recipe.seed)
        except ValueError as error:
            raise UsageError(str(error)) from error
        self.metrics = training.Metrics(self.folder / "metrics.jsonl", tensorboard=tensorboard)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Run":
        """The run that a folder holds.

        Raises:
          UsageError: for a folder without one.
        """
        try:
            options = json.loads((Path(folder) / "run.json").read_text())
            return cls(folder, options.pop("mechanism"), Recipe(**options))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"no run in {folder}: expected a folder that `attnx train` or `attnx compare` made") from error

    def claim(self) -> None:
        """Makes the folder this run's, see :func:`claim`."""
        claim(self.folder / "run.json", {"mechanism": self.name, **dataclasses.asdict(self.recipe)})

    def checkpoints(self) -> training.Checkpoints:
        """The checkpoints of the run."""
        return training.Checkpoints(self.folder / "checkpoints")

    def params(self):
        """The parameters of the last checkpoint.

        Raises:
          TrainingError: where there is none that can be used.
        """
        with self.checkpoints() as checkpoints:
            return checkpoints.restore({"params": self.model.abstract}).state["params"]

    def prepare(self, mesh: jax.sharding.Mesh | None = None) -> Prepared:
        """Compiles the training step and makes the initial state, on one device or a mesh."""
        recipe, optimizer, shardings, share = self.recipe, self._optimizer(), None, {"process_index": 0, "process_count": 1}
        names = ("tokens", "segment_ids") if recipe.separate else ("tokens",)

        def make():
            return training.init_state(self.model.init(), optimizer, jax.random.key(recipe.seed))

        def place(batch):
            return {name: batch[name] for name in names}

        abstract = jax.eval_shape(make)
        if mesh is not None:
            placement = training.Placement(mesh, recipe.batch)
            shardings = training.shardings(mesh, abstract), placement.sharding
            share = {"process_index": placement.process_index, "process_count": placement.process_count}
        step = training.make_train_step(self.model.loss, optimizer, accumulate=recipe.accumulate, shardings=shardings)
        batch = {name: jax.ShapeDtypeStruct((recipe.batch, recipe.length + 1), "int32") for name in names}
        return Prepared(step.lower(abstract, batch).compile(), jax.jit(make, out_shardings=shardings and shardings[0])(),
                        place if mesh is None else lambda batch: placement(place(batch)), share)

    def train(self, prepared: Prepared, corpus: training.Corpus, *, report: Callable[[int, dict[str, float]], None],
              notify: Callable[[str], None]):
        """Trains to the last step, from the last checkpoint if there is one, and returns the parameters; see :func:`attnx.training.fit`."""
        recipe = self.recipe
        batches = training.batches(corpus, length=recipe.length, batch_size=recipe.batch, seed=recipe.seed, **prepared.share)
        with self.checkpoints() as checkpoints:
            return training.fit(prepared.step, prepared.state, batches, steps=recipe.steps, checkpoints=checkpoints,
                                save_every=recipe.save_every, metrics=self.metrics, report=report, notify=notify,
                                place=prepared.place).params

    def _optimizer(self):
        """Muon and Adam, their rates warmed up, held and decayed."""
        def schedule(peak):
            return training.warmup_stable_decay(peak, self.recipe.steps, warmup=min(self.recipe.warmup, self.recipe.steps),
                                                decay=round(self.recipe.decay * self.recipe.steps))

        return training.muon(schedule(self.recipe.learning_rate), adam_learning_rate=schedule(self.recipe.adam_learning_rate))


def claim(file: Path, options: dict[str, Any]) -> None:
    """Writes the options of a run to its folder, or checks that they are those of the run that is there.

    Raises:
      UsageError: for a folder of a run with other options, or one that cannot be written.
    """
    options = json.loads(json.dumps(options))
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            own = file.with_suffix(f".{os.getpid()}.tmp")  # several processes may claim it at once
            own.write_text(json.dumps(options, indent=2))
            own.replace(file)
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot use {file}: {error}") from error
    other = [f"{name} {found.get(name)} there, {options.get(name)} here" for name in {**found, **options} if found.get(name) != options.get(name)]
    if other:
        raise UsageError(f"{file.parent} holds a run with other options ({'; '.join(other)}); choose another folder with --out, or remove it")


def _check(recipe):
    least = {"seed": 0, "warmup": 0}
    for name, value in dataclasses.asdict(recipe).items():
        if isinstance(value, int) and value < least.get(name, 1) and not isinstance(value, bool):
            raise UsageError(f"--{name.replace('_', '-')}: expected {least.get(name, 1)} or more, got {value}")
    if recipe.batch % recipe.accumulate:
        raise UsageError(f"--batch: expected a multiple of --accumulate {recipe.accumulate}, got {recipe.batch}")
    if not 0 <= recipe.decay <= 1:
        raise UsageError(f"--decay: expected a share between 0 and 1, got {recipe.decay}")
