"""What is asked of vLLM's pools while a model loads, and weights that are loaded again, in place. Sleep itself takes a
GPU: `test_gpu_sleep.py`."""

import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from .conftest import BUDGET, LLAMA, assert_same, random_prompt, save_random_model

pytestmark = pytest.mark.engine

torch = pytest.importorskip("torch")

from vllm.device_allocator.cumem import CuMemAllocator  # noqa: E402

from spla_backend import learned  # noqa: E402
from spla_backend.engine import impl, memory  # noqa: E402

MODEL = LLAMA | {"tie_word_embeddings": False}  # vLLM's CPU engine does not load a tied head again
HEADS = MODEL["num_attention_heads"]
LAYERS = MODEL["num_hidden_layers"]
PROMPTS = [random_prompt(n, seed=n) for n in (5, 600)]


class Allocator:
    """Tags of vLLM's, without its pools."""

    def __init__(self, tag: str) -> None:
        self.current_tag = tag

    @contextmanager
    def use_memory_pool(self, tag):
        before, self.current_tag = self.current_tag, tag
        yield
        self.current_tag = before


@pytest.fixture
def allocator(monkeypatch):
    """Of an engine with sleep mode that loads its model."""
    allocator = Allocator("weights")
    monkeypatch.setattr(CuMemAllocator, "instance", allocator)
    monkeypatch.setattr(CuMemAllocator, "get_instance", lambda: allocator)
    return allocator


def test_pools(allocator):
    """The tags are vLLM's own: what it keeps at every level, and what it drops at every level."""
    with memory.kept_pool():
        assert allocator.current_tag == "runtime"
        with memory.scratch_pool()():
            assert allocator.current_tag == "workspace"
    assert allocator.current_tag == "weights"
    assert memory.scratch_pool() is memory.scratch_pool()  # or layers would not share their scratch
    allocator.current_tag = CuMemAllocator.default_tag  # in memory that nobody takes away
    with memory.kept_pool(), memory.scratch_pool()():
        assert allocator.current_tag == CuMemAllocator.default_tag


def test_vllm_keeps_these_tags(monkeypatch):
    """Suspending offloads `runtime` and never `workspace`; waking brings back both, whatever is woken."""
    from vllm import device_allocator
    from vllm.device_allocator.sleep_mode_backend import CuMemBackend

    offloaded = []
    allocator = SimpleNamespace(sleep=lambda offload_tags: offloaded.append(offload_tags))
    monkeypatch.setattr(device_allocator, "get_mem_allocator_instance", lambda: allocator)
    for level in (1, 2):
        CuMemBackend().suspend(level)
    assert all("runtime" in tags and "workspace" not in tags for tags in offloaded) and len(offloaded) == 2
    assert not {"runtime", "workspace"} & set(device_allocator.DEFERRABLE_TAGS)


def test_layers_share_a_pool(allocator):
    """Their kernels are made once all of them are ready, and once only."""
    made = []
    config = SimpleNamespace(cache_config=SimpleNamespace(block_size=64))

    def layer(number):
        one = SimpleNamespace(op=None, learned=None, vllm_config=config)

        def bind(page_size, dtype, device):
            made.append((number, page_size, allocator.current_tag))
            one.op = object()

        one.bind = bind
        return SimpleNamespace(impl=one, kv_cache_torch_dtype=torch.float16)

    layers = [layer(0), layer(1)]
    for one in layers:
        assert not made
        one.impl.learned = learned.LayerParameters()
        impl._bind_all(layers)
    assert made == [(0, 64, "runtime"), (1, 64, "runtime")]
    impl._bind_all(layers)
    assert len(made) == 2


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Two of them, with other weights."""
    folder = tmp_path_factory.mktemp("models")
    return [Path(save_random_model(folder / f"llama-{i}", MODEL, std)) for i, std in enumerate((0.08, 0.07))]


@pytest.fixture
def gains() -> dict[int, learned.LayerParameters]:
    """Gains and scales."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return 3 * torch.rand(size, generator=generator)

    return {i: learned.LayerParameters(gain=draw(HEADS), residual_scale=draw(1)) for i in range(LAYERS)}


def reload(engine, **arguments):
    engine.llm.collective_rpc("reload_weights", kwargs=arguments)


def test_reload(models, gains, tmp_path, start):
    """Weights in place, the same or others; learned parameters stay."""
    model, other = map(str, models)
    file = tmp_path / "gains.safetensors"
    learned.write(file, gains, {})
    options = {"budget": BUDGET, "parameters_file": str(file)}
    with start(other, options=options) as engine:
        expected = engine.answer(PROMPTS)
    with start(model, options=options) as engine:
        first = engine.answer(PROMPTS)
        reload(engine)
        assert_same(engine.answer(PROMPTS), first, tolerance=1e-6)
        reload(engine, weights_path=other)
        assert_same(engine.answer(PROMPTS), expected, tolerance=1e-5)
    assert [answer.tokens for answer in first] != [answer.tokens for answer in expected]


@pytest.mark.parametrize("other", [True, False], ids=["other", "none"])
def test_reload_with_other_parameters(models, gains, tmp_path, start, other):
    """Kernels would go on with those that they have."""
    model, following = (Path(shutil.copytree(models[0], tmp_path / name)) for name in ("model", "following"))
    learned.write(model / learned.FILE_NAME, gains, {})
    if other:
        ones = {i: learned.LayerParameters(gain=torch.ones(HEADS)) for i in range(LAYERS)}
        learned.write(following / learned.FILE_NAME, ones, {})
    sentence = "learned parameters of .*following are not those that the engine started with"
    with start(str(model)) as engine, pytest.raises(RuntimeError, match=sentence):
        reload(engine, weights_path=str(following))
