"""Triton's interpreter without what it does over and over, which is most of its time.

* At every launch, and at every call of a device function, it replaces the members of `triton.language`: here once.
* It computes every sum, difference and product of integers again in int64, for an assertion that it then does not make,
  because `debug` is off.
* It asks of operands that are alike in what type to compute, broadcasts those of one shape, too, and makes a number
  that stands in a kernel a tensor at every operation.
* It makes every type of a block anew, with all that follows from its shape, and asks a new table for its NumPy dtype.
* It asks of every argument, whatever it is, whether it is a constant, and passes every call of an operation through two
  functions that look for `_semantic` among its arguments.
* It checks what it made itself, a NumPy array of an element's size, at every tensor.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder, interpreter_semantic


def install() -> None:
    assert not interpreter_builder.options.debug
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
    _replace_members_once()
    _remember_types()
    _convert_what_differs()
    _broadcast_what_differs()
    _look_at_constants_alone()
    _trust_handles()


def _replace_members_once() -> None:
    patch = interpreter._patch_lang
    scopes: dict[int, interpreter._LangPatchScope] = {}  # by the names that a function sees

    def patch_once(function: Callable) -> interpreter._LangPatchScope:
        seen = id(function.__globals__)
        if seen not in scopes:
            scopes[seen] = patch(function)
        return scopes[seen]

    def call(self, *args, **kwargs):
        patch_once(self.fn)
        return self.rewrite()(*args, **kwargs)

    def patch_attr(obj, name, member, builder, scope):
        function = getattr(member, "__wrapped__", member)  # behind the check for `_semantic`

        def operation(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, operation)

    interpreter._patch_lang, interpreter._patch_attr = patch_once, patch_attr
    interpreter._LangPatchScope.restore = lambda self: None
    InterpretedFunction.__call__ = call


def _remember_types() -> None:
    make_type, make_tensor, np_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    types: dict[tuple, dict] = {}
    dtypes: dict[str, object] = {}

    def make_type_once(self, element_ty, shape):
        size = tuple(getattr(x, "value", x) for x in shape)
        if element_ty.is_ptr():
            make_type(self, element_ty, shape)
            self.size = size
            return
        key = (element_ty.name, size)
        if key not in types:
            make_type(self, element_ty, shape)
            self.size = size
            types[key] = self.__dict__
        self.__dict__ = types[key]  # what `make_tensor_of_type` remembers of it, too

    def make_tensor_of_type(self, handle, type):
        known = type.__dict__.get("of_tensor")
        if known is None:
            make_tensor(self, handle, type)
            type.of_tensor = self.shape, self.numel, self.dtype
            return
        self.handle, self.type = handle, type
        self.shape, self.numel, self.dtype = known

    def np_dtype_once(dtype):
        scalar = dtype.scalar
        if scalar.is_ptr():
            return np_dtype(dtype)
        if scalar.name not in dtypes:
            dtypes[scalar.name] = np_dtype(scalar)
        return dtypes[scalar.name]

    tl.block_type.__init__, tl.tensor.__init__ = make_type_once, make_tensor_of_type
    interpreter._get_np_dtype = np_dtype_once


def _convert_what_differs() -> None:
    check = TritonSemantic.binary_op_type_checking_impl
    as_they_are = {"fp32", "int32", "int64", "int1"}  # what computes in its own type, in divisions, too
    numbers: dict[tuple, tl.tensor] = {}

    def convert_what_differs(
        self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False
    ):
        if type(lhs) is tl.tensor and lhs.dtype.name in as_they_are:
            if type(rhs) is tl.tensor:
                if rhs.dtype.name == lhs.dtype.name:
                    return self.broadcast_impl_value(lhs, rhs)
            elif type(rhs) in (int, float, bool) and rhs == rhs:
                # -0.0 is 0.0, but for its sign
                key = lhs.dtype.name, type(rhs), rhs, str(rhs)[0], arithmetic_check, div_or_mod
                if key in numbers:
                    return self.broadcast_impl_value(lhs, numbers[key])
                scalar = tl.tensor(None, lhs.dtype)
                computed, number = check(self, scalar, rhs, False, False, arithmetic_check, div_or_mod)
                if computed is scalar:
                    numbers[key] = number
        return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    TritonSemantic.binary_op_type_checking_impl = convert_what_differs


def _broadcast_what_differs() -> None:
    broadcast = TritonSemantic.broadcast_impl_value

    def splat(x: tl.tensor, block: tl.block_type) -> tl.tensor:
        data = x.handle.data
        handle = TensorHandle(np.full(block.size, data.reshape(-1)[0], data.dtype), x.handle.dtype.scalar)
        return tl.tensor(handle, block.with_element_ty(x.dtype))

    def broadcast_what_differs(self, lhs, rhs):
        of_lhs, of_rhs = lhs.type, rhs.type
        if type(of_lhs) is not tl.block_type:
            return (lhs if type(of_rhs) is not tl.block_type else splat(lhs, of_rhs)), rhs
        if type(of_rhs) is not tl.block_type:
            return lhs, splat(rhs, of_lhs)
        return (lhs, rhs) if of_lhs.size == of_rhs.size else broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_what_differs


def _look_at_constants_alone() -> None:
    unwrap = tl.core._unwrap_if_constexpr
    plain = {tl.tensor, tl.dtype, tl.block_type, tl.pointer_type, int, float, bool, str, type(None)}
    tl.core._unwrap_if_constexpr = lambda x: x if type(x) in plain else unwrap(x)


def _trust_handles() -> None:
    compute = interpreter.InterpreterBuilder.binary_op

    def make_handle(self, data, dtype, attr=None):
        self.data, self.dtype = data, dtype
        self.attr = {} if attr is None else attr

    def compute_numbers(self, lhs, rhs, op):
        dtype = lhs.dtype.scalar
        if lhs.data.dtype.kind == "b" or dtype.is_ptr():
            return compute(self, lhs, rhs, op)
        output = op(lhs.data, rhs.data)
        if 8 * output.itemsize > max(8, dtype.primitive_bitwidth):
            output = output.astype(interpreter._get_np_dtype(dtype))
        return TensorHandle(output, dtype)

    TensorHandle.__init__ = make_handle
    interpreter.InterpreterBuilder.binary_op = compute_numbers
