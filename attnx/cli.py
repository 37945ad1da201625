"""The command ``attnx``.

Packages announce their subcommands as entry points of the group ``attnx.commands``, each a function
``main(program, arguments)``: the words by which it was called, and the rest of the line. A subcommand fails in an expected way by
raising an exception that has an ``exit_code``: its message becomes one line on stderr. Any other exception is a bug and shows where.
"""

import ast
import difflib
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata

GROUP = "attnx.commands"


class UsageError(Exception):
    """A command line that cannot be carried out as written."""

    exit_code = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line ``attnx arguments`` and returns its exit code: 0, or 2 for a wrong line, or what the subcommand says."""
    return run("attnx", metadata.entry_points(group=GROUP), arguments)


def run(program: str, commands: Iterable[metadata.EntryPoint], arguments: Sequence[str] | None = None) -> int:
    """Runs one of ``commands``.

    Args:
      program: how the user calls the command.
      commands: the subcommands, as entry points that load as ``main(program, arguments)``.
      arguments: name and arguments of a subcommand; by default those of the process.

    Returns:
      The exit code.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    known = {command.name: command for command in sorted(commands, key=lambda command: command.name)}
    if name in ("-h", "--help"):
        print(_help(program, known))
        return 0
    if name == "--version":
        print("attnx", metadata.version("attnx"))
        return 0
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"expected one of: {', '.join(known) or 'none is installed'}"
        return _fail(program, f"unknown command '{name}'; {hint}", 2)
    program = f"{program} {name}"
    try:
        return known[name].load()(program, rest) or 0
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "attnx", "pallas_kernels", "experiments"):
            raise
        return _fail(program, f'needs {missing}, which is not installed: pip install "attnx[experiments]"', 2)
    except KeyboardInterrupt:
        return _fail(program, "interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe has gone, as `head` does; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        return _fail(program, str(error), error.exit_code)


def _fail(program: str, message: str, code: int) -> int:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _help(program: str, commands: dict[str, metadata.EntryPoint]) -> str:
    width = max(map(len, commands), default=0)
    lines = [f"usage: {program} COMMAND [OPTIONS]", "", "commands:"]
    lines += [f"  {name:{width}}  {_summary(command)}" for name, command in commands.items()]
    lines += ["", f"`{program} COMMAND --help` explains a command and its options."]
    if "compare" in commands:
        lines += [f"Start with `{program} compare`: it trains small language models with several attention mechanisms and compares them."]
    return "\n".join(lines)


def _summary(command: metadata.EntryPoint) -> str:
    """The first line of a command's module, read without importing it: what it imports may be missing, and takes time."""
    try:
        spec = importlib.util.find_spec(command.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.origin:
        return "(not installed)"
    with open(spec.origin, encoding="utf-8") as file:
        docstring = ast.get_docstring(ast.parse(file.read())) or ""
    return docstring.partition("\n")[0]
