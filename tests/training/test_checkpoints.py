"""Checkpoints: complete, verified, and the one before where one is not."""

import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.training import Checkpoints, TrainingError

STATE = {"table": jnp.arange(600.0).reshape(20, 30), "half": jnp.ones((3, 5), jnp.bfloat16), "step": jnp.int32(4), "key": jax.random.key(3)}


def scaled(factor):
    return {**STATE, "table": STATE["table"] * factor}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Five checkpoints, of which the second was the best, two kept."""
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(path, keep=2) as checkpoints:
        for step, loss in enumerate((0.5, 0.1, 0.3, 0.4, 0.2), 1):
            checkpoints.save(step, scaled(step), {"at": step}, loss=loss)
    return path


@pytest.fixture
def path(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(*(x if x.dtype != STATE["key"].dtype else jax.random.key_data(x) for x in (a, b))),
                 got, want)


def test_what_is_saved_is_restored(path):
    with Checkpoints(path) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
        restored = checkpoints.restore(jax.eval_shape(lambda: STATE))
        assert (restored.step, restored.extra, restored.damaged) == (5, {"at": 5}, ())
        same(restored.state, scaled(5))
        best = checkpoints.restore({"table": STATE["table"]}, step=2)
        same(best.state, {"table": STATE["table"] * 2})


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    forward = jax.jit(lambda state: {"x": state["x"] + 1}, donate_argnums=0)
    state = {"x": jnp.zeros(300_000)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(3):
            checkpoints.save(step, state, loss=1.0)
            for _ in range(10):
                state = forward(state)
        checkpoints.wait()
        for step in range(3):
            np.testing.assert_array_equal(checkpoints.restore(state, step).state["x"], 10.0 * step)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def alter(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, alter, lambda file: file.unlink()], ids=["cut", "altered", "gone"])
@pytest.mark.parametrize("which", ["arrays", "seal"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(path, damage, which):
    file = path / "5.json" if which == "seal" else max((path / "5").rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
    damage(file)
    with Checkpoints(path) as checkpoints:
        restored = checkpoints.restore(STATE)
        assert restored.step == 4
        same(restored.state, scaled(4))
        gone = which == "seal" and not file.exists() and not restored.damaged  # without its seal it was never finished
        assert gone or f"checkpoint {path / '5'} is damaged" in restored.damaged[0]
        checkpoints.save(5, scaled(7), loss=0.2)
        checkpoints.wait()
        same(checkpoints.restore(STATE).state, scaled(7))


def test_no_usable_checkpoint(path):
    for step in (2, 4, 5):
        alter(path / f"{step}.json")
    with Checkpoints(path) as checkpoints, pytest.raises(TrainingError, match=r"5 is damaged.*4 is damaged.*2 is damaged.*no usable checkpoint in"):
        checkpoints.restore(STATE)


def test_another_model_is_no_damage(path):
    with Checkpoints(path) as checkpoints:
        for template in ({"table": jnp.zeros((20, 31))}, {"tables": STATE["table"]}, {"table": STATE["table"].astype(jnp.bfloat16)}):
            with pytest.raises(TrainingError, match="5 is of another model: table"):
                checkpoints.restore(template)
        assert checkpoints.steps() == [2, 4, 5]


def test_a_full_disk_is_one_clear_error(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # no file of this process may be longer
        try:
            with pytest.raises(TrainingError, match=r"cannot write a checkpoint in .*; the last good one is .*/5"):
                checkpoints.save(6, STATE, loss=1.0)
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert checkpoints.steps() == [2, 4, 5]
        checkpoints.save(6, scaled(6), loss=1.0)  # space has been made
        same(checkpoints.restore(STATE, 5).state, scaled(5))
        checkpoints.wait()
        same(checkpoints.restore(STATE).state, scaled(6))
