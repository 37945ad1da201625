"""The loop: a run that was stopped takes the same steps as one that was not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnx.training import Checkpoints, Corpus, Metrics, TrainingError, batches, fit, init_state, make_train_step

TEXT = Corpus.of([("a", np.random.default_rng(0).integers(1, 256, 300, dtype=np.uint8))])
OPTIMIZER = optax.adam(0.01)
STEPS = 14


def loss(params, batch, key):
    """Bigram logits from a factored table, with dropout."""
    tokens = batch["tokens"]
    hidden = params["in"][tokens[:, :-1]]
    hidden = jnp.where(jax.random.bernoulli(key, 0.8, hidden.shape), hidden, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ params["out"], tokens[:, 1:])
    return losses.sum(), losses.size


STEP = make_train_step(loss, OPTIMIZER)


class Stopped(BaseException):
    """What a signal does to a loop."""


def run(folder, *, step=STEP, stop_after=None, steps=STEPS):
    """Trains; returns the final parameters and what was reported and notified."""
    first, second = jax.random.split(jax.random.key(0))
    params = {"in": jax.random.normal(first, (256, 8)), "out": jax.random.normal(second, (8, 256))}
    reported, notes = [], []

    def report(number, values):
        reported.append(number)
        if number == stop_after:
            raise Stopped

    with Checkpoints(folder / "checkpoints") as checkpoints:
        state = fit(step, init_state(params, OPTIMIZER, jax.random.key(1)), batches(TEXT, length=16, batch_size=3), steps=steps,
                    checkpoints=checkpoints, save_every=4, metrics=Metrics(folder / "metrics.jsonl"), report=report, notify=notes.append)
    return state.params, reported, notes


def curve(folder):
    return [(record["step"], record["loss"], record["grad_norm"]) for record in Metrics(folder / "metrics.jsonl").read()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    params, reported, notes = run(folder)
    assert reported == list(range(STEPS + 1)) and not notes
    assert [number for number, *_ in curve(folder)] == list(range(1, STEPS + 1))
    return params, curve(folder)


def check(folder, params, unbroken):
    assert curve(folder) == unbroken[1]
    jax.tree.map(np.testing.assert_array_equal, params, unbroken[0])


@pytest.mark.parametrize("stops", [(2,), (4,), (7, 9, 13)])
def test_stopped_and_resumed_is_the_same_bit_for_bit(tmp_path, unbroken, stops):
    for stop in stops:
        with pytest.raises(Stopped):
            run(tmp_path, stop_after=stop)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')  # a line cut short
    params, reported, notes = run(tmp_path)
    last = (max(stops) - 1) // 4 * 4  # a step is reported before its checkpoint is begun
    assert reported == list(range(last, STEPS + 1))
    assert notes == ([f"resuming from step {last}"] if last else [])
    check(tmp_path, params, unbroken)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, unbroken):
    with pytest.raises(Stopped):
        run(tmp_path, stop_after=13)
    file = max((tmp_path / "checkpoints" / "12").rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
    file.write_bytes(file.read_bytes()[:-7])
    params, reported, notes = run(tmp_path)
    assert "12 is damaged" in notes[0] and notes[1] == "resuming from step 8"
    check(tmp_path, params, unbroken)


def test_a_finished_run_is_not_trained_again(tmp_path, unbroken):
    run(tmp_path)
    params, reported, _ = run(tmp_path)
    assert reported == [STEPS]
    check(tmp_path, params, unbroken)


@pytest.mark.parametrize("metric", ["loss", "grad_norm"])
def test_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, unbroken, metric):
    def broken(state, batch):
        bad = int(state.step) == 9
        state, values = STEP(state, batch)
        return state, {**values, metric: values[metric] * (np.nan if bad else 1)}

    with pytest.raises(TrainingError, match=rf"{metric} = nan.* at step 10; the last good checkpoint is .*/8$"):
        run(tmp_path, step=broken)
    assert curve(tmp_path) == unbroken[1][:9]
    check(tmp_path, run(tmp_path)[0], unbroken)


def test_metrics_that_cannot_be_written_stop_the_run(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(TrainingError, match=r"cannot write .*taken/metrics.jsonl: (Not a directory|File exists)"):
        Metrics(tmp_path / "taken" / "metrics.jsonl").write(1, {"loss": 1.0})
