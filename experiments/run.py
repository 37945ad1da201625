"""A training run in a folder: its options, its checkpoints, its metrics; made, resumed or read."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    steps: int = 1200
    """Number of updates."""
    learning_rate: float = 0.02
    """Peak rate of Muon, which trains the matrices inside the blocks."""
    adam_learning_rate: float = 0.01
    """Peak rate of Adam, which trains the rest."""
    warmup: int = 20
    """Updates over which the rates rise."""
    decay: float = 0.4
    """Share of the updates, at the end, over which the rates fall to zero."""
    seed: int = 0
    """Of initial parameters and of the order of the data."""
    save_every: int = 100
    """Updates from one checkpoint to the next."""


class Run:
    """A recipe and a mechanism in a folder.

    Args:
      folder: made where it is missing; where it is not, it has to be of the same run.
      name: of the mechanism, see :func:`experiments.mechanisms.mechanism`.
      recipe: the rest.

    Raises:
      UsageError: for a folder of another run, or options that no model has.
    """

    def __init__(self, folder: str | os.PathLike, name: str, recipe: Recipe):
        self.folder, self.name, self.recipe = Path(folder), name, recipe
        check_options(recipe)
        claim(self.folder, {"mechanism": name, **dataclasses.asdict(recipe)})
        try:
            self.model = LanguageModel(recipe, mechanism(name, recipe.length), recipe.seed)
        except ValueError as error:
            raise UsageError(str(error)) from error
        self.metrics = training.Metrics(self.folder / "metrics.jsonl")

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Run":
        """The run of a folder.

        Raises:
          UsageError: for a folder without one.
        """
        try:
            options = json.loads((Path(folder) / "run.json").read_text())
            return cls(folder, options.pop("mechanism"), Recipe(**options))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"no run in {folder}: expected a folder that `attnx train` or `attnx compare` made ({error})") from error

    def train(self, corpus: training.Corpus, *, mesh: jax.sharding.Mesh | None = None,
              report: Callable[[int, dict[str, float]], None] = lambda step, values: None,
              notify: Callable[[str], None] = print) -> training.TrainState:
        """Trains to the last step, from the last checkpoint if there is one; on ``mesh`` where one is given."""
        placement = None if mesh is None else training.Placement(mesh, self.recipe.batch)
        batches = training.batches(corpus, length=self.recipe.length, batch_size=self.recipe.batch, seed=self.recipe.seed,
                                   process_index=placement.process_index if placement else 0,
                                   process_count=placement.process_count if placement else 1)
        with contextlib.nullcontext() if mesh is None else training.use(mesh), self.checkpoints() as checkpoints:
            step, state = self._prepare(mesh, placement)
            return training.fit(step, state, batches, steps=self.recipe.steps, checkpoints=checkpoints, save_every=self.recipe.save_every,
                                metrics=self.metrics, report=report, notify=notify, place=self._place(placement))
