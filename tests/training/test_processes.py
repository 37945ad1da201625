"""Two processes that find each other as under SLURM, over loopback, train as one does."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import train
from experiments.run import Run

OPTIONS = "--features 16 --layers 1 --heads 2 --length 16 --batch 4 --steps 6 --save-every 3".split()


def together(options):
    """Runs the command in two processes of two devices each, as ``srun`` would start it."""
    job = 1 + os.getpid() % 4000  # the port follows from the job
    cluster = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    folder = jax.config.jax_compilation_cache_dir
    cache = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | ({"JAX_COMPILATION_CACHE_DIR": folder} if folder else {})
    environment = {**os.environ, **cluster, **cache, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "attnx", "train", "--distributed", *options]
    processes = [subprocess.Popen(command, env={**environment, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)},
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for n in range(2)]
    try:
        printed = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    return printed


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in "abcdefgh":
        (folder / name).write_bytes(np.random.default_rng(ord(name)).integers(97, 123, 300, dtype=np.uint8).tobytes())
    return folder


def test_two_processes_agree_with_one(text, tmp_path):
    options = [*OPTIONS, "--data", str(text)]
    assert train.main("attnx train", [*options, "--out", str(tmp_path / "one")]) == 0
    printed = together([*options, "--out", str(tmp_path / "two"), "--mesh-fsdp", "2", "--mesh-sequence", "2"])
    assert "held-out text" in printed[0][0] and "held-out text" not in printed[1][0]
    one, two = Run.read(tmp_path / "one"), Run.read(tmp_path / "two")
    records = [run.metrics.read() for run in (one, two)]
    assert [record["step"] for record in records[1]] == list(range(1, 7))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(*([record[name] for record in run] for run in records), rtol=1e-5)
    for x, y in zip(*(jax.tree.leaves(run.params()) for run in (one, two))):
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(x)
