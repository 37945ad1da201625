"""Writes text with a trained or pretrained model, as it is chosen."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import jax
import tyro

from attnx import pretrained
from attnx.cli import UsageError
from experiments.options import parse
from experiments.run import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """Continues a prompt with the model of a run, as `attnx train` and `attnx compare` leave it, byte by byte, or with a pretrained decoder."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the run, such as runs/compare/softmax; or a pretrained decoder: smollm2-135m (see `attnx fetch`), a .gguf file or hf://owner/name."""
    prompt: str = "import "
    """What comes before; `-` reads it from the standard input."""
    length: int = 500
    """Bytes to write, or tokens of a pretrained decoder at the most."""
    temperature: float = 0.7
    """Below 1 likely bytes or tokens become likelier; 0 always takes the likeliest."""
    top_k: int | None = None
    """Choose among so many of the likeliest; all by default."""
    seed: int = 0
    """Of the choices."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``generate``."""
    options = parse(Options, program, arguments)
    if options.temperature < 0:
        raise UsageError(f"--temperature: expected 0 or more, got {options.temperature}")
    if options.run in pretrained.PACKAGED or options.run.startswith(pretrained.HUB) or options.run.endswith(".gguf"):
        return continue_pretrained(options)
    if options.top_k is not None and not 1 <= options.top_k <= 256:
        raise UsageError(f"--top-k: expected 1 to 256, got {options.top_k}")
    if options.length < 0:
        raise UsageError(f"--length: expected 0 or more, got {options.length}")
    run = Run.read(options.run)
    params = run.params()
    prompt = sys.stdin.buffer.read() if options.prompt == "-" else options.prompt.encode()
    write(prompt)
    for byte in run.model.stream(params, prompt, options.length, temperature=options.temperature, top_k=options.top_k, seed=options.seed):
        write(bytes([byte]))
    write(b"\n")
    return 0


def continue_pretrained(options: Options) -> int:
    """The command for a pretrained decoder."""
    model = pretrained.load(options.run)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    try:
        pieces = model.generate(prompt, options.length, temperature=options.temperature, top_k=options.top_k, key=jax.random.key(options.seed))
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    write(prompt.encode())
    for piece in pieces:
        write(piece.encode())
    write(b"\n")
    return 0


def write(content: bytes) -> None:
    """Shows bytes at once."""
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
