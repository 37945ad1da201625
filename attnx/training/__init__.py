"""Training: data, sharding, the step, the loop, checkpoints and metrics."""

from attnx.training.checkpoints import Checkpoints, Restored
from attnx.training.data import Corpus, Spans, Windows, batches, read, spans
from attnx.training.errors import DataError, TrainingError
from attnx.training.loop import fit
from attnx.training.metrics import Metrics
from attnx.training.optimizers import adamw, muon, warmup_stable_decay
from attnx.training.sharding import RULES, Placement, make_mesh, shardings, use
from attnx.training.step import TrainState, init_state, make_train_step

__all__ = ["RULES", "Checkpoints", "Corpus", "DataError", "Metrics", "Placement", "Restored", "Spans", "TrainState", "TrainingError", "Windows",
           "adamw", "batches", "fit", "init_state", "make_mesh", "make_train_step", "muon", "read", "shardings", "spans", "use",
           "warmup_stable_decay"]
