"""Triton's interpreter, as far as Liger's kernels need it to run on CPU tensors as they would on a GPU, in bfloat16 too.

    TRITON_INTERPRET=1 python -c 'import triton_interpreter, runpy; …'

To be imported before any kernel is decorated, under TRITON_INTERPRET=1, which makes dilqur/kernels/choose.py `triton_runs` true. As it
comes, the interpreter (triton 3.9) knows no libdevice, takes a Python float for float64, and computes on the bits of a bfloat16: here such
operands are made fp32, and results are rounded to nearest, as a GPU does. The order of sums is NumPy's, and not a GPU's."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def widened(bits):
    """fp32 of bfloat16s, which NumPy has as uint16."""
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16).float().numpy()


def rounded(numbers):
    """The other way, to nearest even."""
    numbers = torch.from_numpy(np.ascontiguousarray(numbers.astype(np.float32)))
    return numbers.bfloat16().view(torch.int16).numpy().view(np.uint16)


def is_bfloat16(handle):
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def install():
    """For the rest of the process."""
    import liger_kernel.ops.cross_entropy
    import liger_kernel.ops.rms_norm

    to_tensor, binary, unary, cast = (
        interpreter._implicit_cvt, Builder.binary_op, Builder.unary_op, Builder.cast_impl,
    )  # fmt: skip

    def implicit(argument):
        if isinstance(argument, float):
            return tl.tensor(Handle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return to_tensor(argument)

    def binary_op(self, left, right, operation):
        if not (is_bfloat16(left) or is_bfloat16(right)):
            return binary(self, left, right, operation)
        found = operation(*(widened(x.data) if is_bfloat16(x) else x.data for x in (left, right)))
        comparison = found.dtype == np.bool_
        return Handle(found, left.dtype.scalar) if comparison else Handle(rounded(found), tl.bfloat16)

    def unary_op(self, argument, operation):
        if not is_bfloat16(argument):
            return unary(self, argument, operation)
        return Handle(rounded(operation(widened(argument.data))), tl.bfloat16)

    def cast_impl(self, source, dtype):
        if is_bfloat16(source) and dtype.scalar != tl.bfloat16:
            source = Handle(widened(source.data), tl.float32)
        if dtype.scalar == tl.bfloat16 and not is_bfloat16(source):
            return Handle(rounded(source.data), dtype.scalar)
        return source if source.dtype.scalar == dtype.scalar else cast(self, source, dtype)

    interpreter._implicit_cvt = implicit
    Builder.binary_op, Builder.unary_op, Builder.cast_impl = binary_op, unary_op, cast_impl
    liger_kernel.ops.rms_norm.rsqrt = lambda x: 1.0 / tl.sqrt(x)
    liger_kernel.ops.cross_entropy.tanh = None  # of models that cap their logits, which are not run in it
