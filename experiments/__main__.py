"""``python -m experiments NAME``: the commands of :mod:`attnx.cli`, without installation."""

import sys
from importlib.metadata import EntryPoint

from attnx import cli

COMMANDS = ("bench", "claim", "compare", "fetch", "generate", "gpu_bench", "list", "memory", "papers", "report", "scale", "show", "tpu_schedule", "train", "tune")

if __name__ == "__main__":
    sys.exit(cli.run("python -m experiments", [EntryPoint(name, f"experiments.{name}:main", cli.GROUP) for name in COMMANDS]))
