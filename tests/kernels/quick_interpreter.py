"""Triton's interpreter without what it does over and over, which is most of its time.

* At every call of a device function it replaces the members of `triton.language`, which the launch has done already.
* It computes every sum, difference and product of integers again in int64, for an assertion that it then does not make,
  because `debug` is off.
* It broadcasts both operands of every operation, those of one shape, too: it compares a tuple with a list.
* It makes every type of a block anew, with all that follows from its shape, and asks a new table for its NumPy dtype.
"""

from dataclasses import replace

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, interpreter_builder


def install() -> None:
    _call_as_launched()
    assert not interpreter_builder.options.debug
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
    _broadcast_what_differs()
    _remember_types()


def _call_as_launched() -> None:
    launch, call = GridExecutor.__call__, InterpretedFunction.__call__
    seen: set[InterpretedFunction] = set()  # device functions that this launch has called

    def launch_anew(self, *args, **kwargs):
        seen.clear()
        return launch(self, *args, **kwargs)

    def call_again(self, *args, **kwargs):
        if self in seen:
            return self.rewrite()(*args, **kwargs)
        seen.add(self)
        return call(self, *args, **kwargs)

    GridExecutor.__call__, InterpretedFunction.__call__ = launch_anew, call_again


def _broadcast_what_differs() -> None:
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_what_differs(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape == rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_what_differs


def _remember_types() -> None:
    make_type, make_tensor, np_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    types: dict[tuple, dict] = {}
    dtypes: dict[str, object] = {}

    def make_type_once(self, element_ty, shape):
        if element_ty.is_ptr() or any(type(size) is not int for size in shape):
            make_type(self, element_ty, shape)
            return
        key = (element_ty.name, *shape)
        if key not in types:
            make_type(self, element_ty, shape)
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
