"""What sleep mode of the engine may take from the kernels: the contents of scratch and of the cache, nothing else, and
whatever then lies there."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from held_tensors import held_tensors
from test_cuda_steps import Engine, draw
from torch.utils._python_dispatch import TorchDispatchMode

from spla_backend.algorithm.parameters import SplaParameters

SHORT, LONG = (40, 2), (95, 3)  # prompt, answer


class Pool(TorchDispatchMode):
    """Remembers the memory of every tensor that is made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.memory[made.untyped_storage().data_ptr()] = made.untyped_storage()
        return made

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self:
            yield


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def serve(engine: Engine, *lengths: tuple[int, int]) -> None:
    """New requests, in pages and states as the first ones of the last time had them."""
    engine.free.sort()
    engine.waiting = [draw(*length, 16) for length in lengths]
    engine.compared = engine.differing = 0
    while engine.waiting or engine.running:
        engine.step()
    assert engine.compared and engine.differing <= 1


@pytest.mark.parametrize(
    ("params", "dense_below"),
    [
        (SplaParameters(16, 16, 5), 0),
        (SplaParameters(32, 16, 5, selector="km2-rem"), 1 << 20),
        (SplaParameters(32, 32, 3, fine_block=16), 1 << 20),
    ],
    ids=["sparse-prompts", "dense-prompts", "two-levels"],
)
def test_scratch_and_cache_hold_anything(
    params: SplaParameters, dense_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(random.randrange(1 << 30))
    pool = Pool()
    engine = Engine([params, params], monkeypatch, dense_below=dense_below, tokens=64, rows=3, scratch_pool=pool)
    made = {address(tensor) for _, tensor in held_tensors(*engine.ops)}

    def sleep() -> None:
        for name, tensor in held_tensors(*engine.ops):
            assert address(tensor) in made, f"{name} was allocated in a step: nobody says what sleep may do to it"
            if address(tensor) in pool.memory:
                tensor.fill_(float("nan") if tensor.is_floating_point() else random.choice((-1, 1)))

    serve(engine, SHORT)
    sleep()  # The cache comes back as it was. If stamps were given again, the old state would pass for the new one's.
    serve(engine, LONG)
    sleep()
    for cache in engine.caches:  # pages and states elsewhere
        cache.copy_(cache[torch.randperm(len(cache))])
    serve(engine, LONG, SHORT, (64, 3))


def test_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is kept is small: the rest is scratch, for which sleep needs no memory of the host."""
    pool = Pool()
    engine = Engine([SplaParameters(16, 16, 5)], monkeypatch, dense_below=0, tokens=64, rows=3, scratch_pool=pool)
    serve(engine, LONG)
    kept = {name for name, tensor in held_tensors(*engine.ops) if address(tensor) not in pool.memory}
    counters = {"arrivals", "fold_arrivals", "attend_arrivals"}
    assert kept == {"gain", "tail_weight", "salt", "_counter"} | counters  # both norms have the same weight here
    scratch = engine.ops[0].steps.scratch | engine.ops[0].passes.scratch
    assert not any(scratch[name].any() for name in counters)  # as they are found after sleep, too
