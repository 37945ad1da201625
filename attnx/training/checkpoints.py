"""Checkpoints: written in the background, complete or not at all, verified before they are used."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from attnx.training.errors import TrainingError


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
      step: its step.
      state: the arrays.
      extra: what was saved beside them.
      damaged: messages that name the later checkpoints that could not be used.
    """

    step: int
    state: Any
    extra: Any
    damaged: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run, in a folder: for each a folder of arrays and, written when that is complete, a seal of checksums.

    Args:
      path: the folder; made where it is missing. With several processes, one that they share.
      keep: how many of the latest to keep; the one of the lowest loss is kept besides.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as path, Checkpoints(path) as checkpoints:
      ...   checkpoints.save(7, {'w': jnp.ones(3)}, {'note': 'seven'}, loss=0.5)
      ...   checkpoints.wait()
      ...   restored = checkpoints.restore({'w': jnp.zeros(3)})
      >>> restored.step, restored.state['w'], restored.extra
      (7, Array([1., 1., 1.], dtype=float32), {'note': 'seven'})
    """

    def __init__(self, path: str | os.PathLike, keep: int = 3):
        self.path, self.keep = Path(path).absolute(), keep
        self._writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._sealer = concurrent.futures.ThreadPoolExecutor(1)
        self._last: concurrent.futures.Future | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.wait()
        finally:
            self._sealer.shutdown()
            self._writer.close()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(int(seal.stem) for seal in self.path.glob("*.json") if seal.stem.isdecimal())

    def save(self, step: int, state, extra=None, *, loss: float) -> None:
        """Copies ``state`` (a pytree of arrays) and begins to write it, with ``extra`` (JSON-able); training may go on at once.

        Raises:
          TrainingError: where this or an earlier checkpoint could not be written.
        """
        with self._writing():
            self._finish()
            self.path.mkdir(parents=True, exist_ok=True)
            self._writer.save(self.path / str(step), args=ocp.args.PyTreeSave(_flatten(state)), force=True)
            self._last = self._sealer.submit(self._seal, {"step": step, "loss": loss, "extra": extra})

    def wait(self) -> None:
        """Returns when all checkpoints are written.

        Raises:
          TrainingError: where one could not be.
        """
        with self._writing():
            self._finish()

    def restore(self, template, step: int | None = None) -> Restored:
        """Reads the latest checkpoint, or that of ``step``, after checking that it is what was written.

        A damaged one is set aside under another name, named in the result, and the one before it used.

        Args:
          template: a pytree of arrays or ``jax.ShapeDtypeStruct``, with shardings where the arrays are to be sharded. It may be a part of
            what was saved.
          step: which to read.

        Returns:
          A :class:`Restored`.

        Raises:
          TrainingError: where no checkpoint can be used, or the latest is of other arrays than ``template``.
        """
        damaged = []
        for candidate in sorted(self.steps() if step is None else [step], reverse=True):
            try:
                note = self._verified(candidate)
            except (OSError, ValueError, KeyError) as error:
                damaged.append(f"checkpoint {self.path / str(candidate)} is damaged: {error}")
                self._set_aside(candidate)
            else:
                return Restored(candidate, self._read(candidate, template), note["extra"], tuple(damaged))
        raise TrainingError("; ".join([*damaged, f"no usable checkpoint in {self.path}"]))

    def _verified(self, step):
        seal = json.loads(self._sealed(step).read_text())
        if seal["crc32"] != zlib.crc32(json.dumps(seal["note"]).encode()):
            raise ValueError(f"{self._sealed(step).name} was altered")
        for name, checksum in seal["note"]["files"].items():
            if _checksum(self.path / str(step) / name) != checksum:
                raise ValueError(f"{step}/{name} was altered or cut short")
        return seal["note"]

    def _read(self, step, template):
        wanted = _flatten(template)
        folder = self.path / str(step)
        saved = self._writer.metadata(folder).item_metadata.tree
        for name, x in wanted.items():
            if name not in saved or (tuple(saved[name].shape), saved[name].dtype) != (tuple(x.shape), x.dtype):
                raise TrainingError(f"{folder} is of another model: {name} is {saved.get(name, 'missing')}, expected {x}")
        arrays = self._writer.restore(folder, args=ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True))
        return _unflatten(template, arrays)

    def _finish(self):
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _seal(self, note):
        """Makes a checkpoint count once it is written, and deletes those that are no longer kept."""
        self._writer.wait_until_finished()
        if jax.process_index() != 0:
            return
        seal, folder = self._sealed(note["step"]), self.path / str(note["step"])
        note["files"] = {file.relative_to(folder).as_posix(): _checksum(file) for file in sorted(folder.rglob("*")) if file.is_file()}
        unfinished = seal.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"note": note, "crc32": zlib.crc32(json.dumps(note).encode())}))
        unfinished.replace(seal)
        losses = {step: _loss(self._sealed(step)) for step in self.steps()}
        for step in sorted(set(losses) - {min(losses, key=losses.get)})[:-self.keep]:
            self._sealed(step).unlink()
            shutil.rmtree(self.path / str(step), ignore_errors=True)

    def _sealed(self, step):
        return self.path / f"{step}.json"

    def _set_aside(self, step):
        if jax.process_index() == 0:
            self._sealed(step).replace(self._sealed(step).with_suffix(".damaged"))

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # the file system's, or one of the storage library's own
            last = [f"the last good one is {self.path / str(step)}" for step in self.steps()[-1:]] or ["there is none yet"]
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            raise TrainingError(f"cannot write a checkpoint in {self.path} ({reason}); {last[0]}") from error


def _checksum(file):
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _loss(seal):
    try:
        return json.loads(seal.read_text())["note"]["loss"]
    except (OSError, ValueError, KeyError):
        return float("inf")


def _flatten(tree):
    """{name: array}, random keys as the integers that they are."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): _key_data(x) if _is_key(x) else x
            for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _unflatten(template, arrays):
    leaves, structure = jax.tree.flatten(template)
    return jax.tree.unflatten(structure, [jax.random.wrap_key_data(x) if _is_key(like) else jnp.asarray(x)
                                          for like, x in zip(leaves, map(arrays.get, _flatten(template)))])


def _is_key(x):
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_data(key):
    return jax.eval_shape(jax.random.key_data, key) if isinstance(key, jax.ShapeDtypeStruct) else jax.random.key_data(key)
