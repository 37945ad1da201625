"""Runs kernels by Triton's interpreter, on NumPy's arrays. It is chosen when a kernel's module is imported: by TRITON_INTERPRET=1 in a process of its own."""

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

NUMPY = {tl.float8e4nv: ml_dtypes.float8_e4m3fn, tl.float16: np.float16, tl.float32: np.float32}


def convert(x, source, target, _):
    """Numbers of one format in another, to nearest even: Triton's own loses the carry where a rounded fraction is 1."""
    return x.view(NUMPY[source]).astype(NUMPY[target]).view(f"u{np.dtype(NUMPY[target]).itemsize}")


interpreter._convert_float = convert


class Array:
    """An array as Triton's interpreter wants a tensor: read and written in place."""

    def __init__(self, array):
        self.array = np.ascontiguousarray(array)
        self.dtype = self.array.dtype.name

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(n // self.array.itemsize for n in self.array.strides)

    def copy_(self, _):
        return self


def call(kernel, inputs, outputs, *, grid, name, warps, stages, scalars=(), **constants):
    """As :func:`pallas_kernels.native.call`, with numbers that say where nothing was written."""
    nothing = np.zeros(1, np.float32)
    results = [None if x is None else Array(np.full(x.shape, np.nan, x.dtype)) for x in outputs]
    kernel[grid](*(Array(nothing if x is None else x) for x in inputs), *scalars, *(x or Array(nothing) for x in results), **constants)
    return [None if x is None else x.array for x in results]
