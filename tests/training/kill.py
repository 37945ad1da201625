"""Kills a run at random moments and checks that, resumed, it takes the steps of a run that nobody killed.

``python tests/training/kill.py 20`` does it twenty times.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, SAVE_EVERY = 120, 5


def train(folder: Path) -> None:
    """The run: a small model with a key, on a shuffled text, slowed down enough to be hit anywhere."""
    import jax
    import numpy as np
    import optax

    from attnx.training import Checkpoints, Corpus, Metrics, batches, fit, init_state, make_train_step

    def loss(params, batch, key):
        hidden = params["in"][batch["tokens"][:, :-1]] * jax.random.bernoulli(key, 0.8, (8,))
        losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ params["out"], batch["tokens"][:, 1:])
        return losses.sum(), losses.size

    text = Corpus.of([("text", np.random.default_rng(0).integers(1, 256, 500, dtype=np.uint8))])
    optimizer = optax.adam(0.01)
    first, second = jax.random.split(jax.random.key(0))
    params = {"in": jax.random.normal(first, (256, 8)), "out": jax.random.normal(second, (8, 256))}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        fit(make_train_step(loss, optimizer), init_state(params, optimizer, jax.random.key(1)), batches(text, length=16, batch_size=3),
            steps=STEPS, checkpoints=checkpoints, save_every=SAVE_EVERY, metrics=Metrics(folder / "metrics.jsonl"),
            report=lambda step, values: time.sleep(0.004))


def curve(folder: Path) -> list[tuple[int, float]]:
    """The steps and losses recorded so far."""
    from attnx.training import Metrics

    return [(record["step"], record["loss"]) for record in Metrics(folder / "metrics.jsonl").read()]


def start(folder: Path) -> subprocess.Popen:
    """A process that trains."""
    return subprocess.Popen([sys.executable, __file__, "train", str(folder)], stdout=subprocess.DEVNULL,
                            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def kill_and_resume(folder: Path, kills: int, seed: int = 0) -> list[int]:
    """Kills the run of ``folder`` ``kills`` times, lets it finish, compares it with another; returns the steps at which it was killed."""
    assert start(folder / "unbroken").wait() == 0
    chance, killed, moments = random.Random(seed), folder / "killed", []
    for number in range(kills):
        process = start(killed)
        moment = chance.randrange(number * STEPS // kills, (number + 1) * STEPS // kills)
        while process.poll() is None and len(curve(killed)) < moment:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.02))
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        moments.append(len(curve(killed)))
    assert start(killed).wait() == 0
    assert curve(killed) == curve(folder / "unbroken") and len(curve(killed)) == STEPS
    return moments


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            print("killed at steps", *kill_and_resume(Path(scratch), int(sys.argv[1]), seed=time.time_ns()), "and the same bit for bit")
