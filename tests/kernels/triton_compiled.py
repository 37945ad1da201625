"""What Triton and its assembler make of kernels for sm_90, on any machine."""

import pathlib
import re
import subprocess
import tempfile
import zlib
from typing import NamedTuple

import jax
import jax.extend.mlir.dialects.stablehlo  # noqa: F401  registers what a lowered module is made of
import triton
from gpu_lowering import lowered

NVIDIA = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Program(NamedTuple):
    """A kernel's assembly, what the assembler makes of it - bytes that do not fit in ``registers`` are stored and loaded - and bytes of shared memory."""

    name: str
    ptx: str
    code: bytes
    registers: int
    spills: int
    shared: int

    def count(self, instruction: str) -> int:
        """How often an instruction (a regular expression) is in its text."""
        return len(re.findall(instruction, self.ptx))


def programs(function, *args, axes=()) -> list[Program]:
    """The kernels in Triton itself that ``function`` becomes when lowered for an H200."""
    found, module = [], lowered(function, *args, axes=axes).compiler_ir("stablehlo")

    def visit(operation):
        for region in operation.regions:
            for block in region:
                for inner in block:
                    visit(inner.operation)
        if operation.name == "stablehlo.custom_call" and operation.attributes["call_target_name"].value == "triton_kernel_call":
            found.append(assembled(*_kernel(operation.attributes["backend_config"].value_bytes)))

    visit(module.operation)
    return found


def _kernel(message: bytes) -> tuple[str, int]:
    """The PTX and the bytes of shared memory in the call of a kernel: a protocol buffer, in which the call is field 1, the kernel field 1 of that."""
    kernel = _fields(_fields(_fields(zlib.decompress(message))[1])[1])
    return kernel[4].decode(), kernel[3]


def _fields(message: bytes) -> dict:
    found, at = {}, 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            value |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                return value

    while at < len(message):
        key = number()
        value = number()
        if key & 7:  # a length, and so many bytes
            value, at = message[at:at + value], at + value
        found.setdefault(key >> 3, value)
    return found


def assembled(ptx: str, shared: int) -> Program:
    """A kernel's machine code."""
    with tempfile.TemporaryDirectory() as folder:
        source, code = (pathlib.Path(folder) / name for name in ("kernel.ptx", "kernel.cubin"))
        source.write_text(ptx)
        run = subprocess.run([NVIDIA / "ptxas", "-v", "--gpu-name=sm_90a", source, "-o", code], capture_output=True, text=True, check=True)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
        used = re.search(r"Used (\d+) registers", run.stderr)
        return Program(re.search(r"\.entry (\w+)", ptx)[1], ptx, code.read_bytes(), int(used[1]), int(spilled[1]) + int(spilled[2]), shared)
