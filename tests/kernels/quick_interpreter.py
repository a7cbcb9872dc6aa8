"""Triton's interpreter without two things that it does over and over, and that are most of its time.

At every call of a device function it replaces the members of `triton.language`, which the launch has done already. And
it computes every sum, difference and product of integers again in int64, for an assertion that it then does not make,
because `debug` is off.
"""

from dataclasses import replace

from triton.runtime.interpreter import GridExecutor, InterpretedFunction, interpreter_builder


def install() -> None:
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
    assert not interpreter_builder.options.debug
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
