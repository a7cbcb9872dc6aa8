"""vLLM's scheduler, pool of pages and metadata builders, and layers of SPLA over them, without a model."""

import contextlib
import functools
import itertools
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Before vLLM is imported.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.plugins import load_general_plugins
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.utils import allocate_kv_cache, bind_kv_cache

from .settings import NUM_HEADS, NUM_KV_HEADS, Settings
from .tokens import VOCABULARY


class WrongAnswer(AssertionError):
    """What a step computed, or which blocks it holds, is not what it should be."""


@functools.cache
def _model_folder(num_layers: int, head_size: int) -> tempfile.TemporaryDirectory:
    """A folder with the configuration of a model that nobody loads; it goes when the process does."""
    folder = tempfile.TemporaryDirectory(prefix="spla-fuzz-")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": NUM_HEADS * head_size,
        "intermediate_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": head_size,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    (Path(folder.name) / "config.json").write_text(json.dumps(config))
    return folder


def _vllm_config(settings: Settings) -> VllmConfig:
    load_general_plugins()
    drafts = {"method": "ngram", "num_speculative_tokens": settings.num_drafts, "prompt_lookup_max": 3}
    arguments = {
        "model": _model_folder(settings.num_layers, settings.head_size).name,
        "skip_tokenizer_init": True,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "enforce_eager": True,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "block_size": settings.page_size,
        "enable_prefix_caching": settings.prefix_caching,
        "async_scheduling": False,
        "attention_backend": "spla",
        "additional_config": {"spla": settings.spla()},
        "speculative_config": drafts if settings.num_drafts else None,
    }
    config = EngineArgs(**arguments).create_engine_config()
    # vLLM refuses it for drafts by ngram, which are drafted on the host; here the worker drafts.
    config.scheduler_config.async_scheduling = settings.asynchronous
    return config


class World:
    """One engine without a model.

    Attributes:
        layers: Attention layers of SPLA, bound to their caches.
        groups: By cache group: the names of its layers and the builder of their metadata.
        of_pages: Index of the group of attention layers.
        of_states: Index of the group of recurrent states; None without a residual.
        scheduler: vLLM's.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings = settings
        self.config = config = _vllm_config(settings)
        self.dtype = config.model_config.dtype
        register_all_kvcache_specs(config)
        with set_current_vllm_config(config):
            self.layers = [self._layer(i) for i in range(settings.num_layers)]
            for layer in self.layers:
                layer.process_weights_after_loading(self.dtype)
            self._make_caches()
            self.scheduler = self._make_scheduler()
        pool = self.scheduler.kv_cache_manager.block_pool
        self.num_free = pool.get_num_free_blocks()
        draw = random.Random(f"blocks of {seed}")
        self.poison = Poison(pool, self.memory, settings.poison, draw)
        self.heirs = Heirs(pool, self.scheduler.kv_cache_manager.coordinator.single_type_managers, draw)

    def _layer(self, index: int) -> Attention:
        size = self.settings.head_size
        name = f"model.layers.{index}.self_attn.attn"
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            return Attention(
                NUM_HEADS, size, size**-0.5, NUM_KV_HEADS, cache_config=self.config.cache_config, prefix=name
            )
        finally:
            torch.set_default_dtype(default)

    def _make_caches(self) -> None:
        config, context = self.config, self.config.compilation_config.static_forward_context
        backends = {name: layer.get_attn_backend() for name, layer in context.items()}
        specs = {n: backends[n].customize_spec(layer.get_kv_cache_spec(config)) for n, layer in context.items()}
        page = specs[self.layers[0].layer_name]
        states = [spec.blocks_per_request for spec in specs.values() if hasattr(spec, "blocks_per_request")]
        self.num_state_blocks = max(states, default=0)
        one_request = -(-self.settings.max_model_len // page.block_size) + self.num_state_blocks
        cache_config = config.cache_config
        cache_config.num_gpu_blocks_override = 1 + one_request + self.settings.spare_pages  # the first is never used
        layout = backends[self.layers[0].layer_name].supported_kv_cache_layouts()[0]
        cache_config.kv_cache_layout = layout.name
        (self.cache_config,) = get_kv_cache_configs(config, [specs], [1 << 30])
        cache_config.num_gpu_blocks = self.cache_config.num_blocks
        caches = allocate_kv_cache(self.cache_config, torch.device("cpu"), layout)
        bind_kv_cache(caches, context, [], kv_cache_groups=self.cache_config.kv_cache_groups)
        self.memory = list(caches.values())
        for cache in self.memory:
            cache.fill_(torch.nan)
        self.groups, self.of_states = [], None
        for index, group in enumerate(self.cache_config.kv_cache_groups):
            names, backend = group.layer_names, backends[group.layer_names[0]]
            builder = backend.get_builder_cls()(group.kv_cache_spec, names, config, torch.device("cpu"))
            self.groups.append((names, builder))
            if self.layers[0].layer_name in names:
                self.of_pages = index
            else:
                self.of_states = index

    def _make_scheduler(self) -> Scheduler:
        config = self.config
        block_size, hash_block_size = resolve_kv_cache_block_sizes(self.cache_config, config)
        hash_fn = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self.block_hasher = None
        if self.settings.prefix_caching:
            self.block_hasher = get_request_block_hasher(hash_block_size, hash_fn)
        return (AsyncScheduler if self.settings.asynchronous else Scheduler)(
            vllm_config=config,
            kv_cache_config=generate_scheduler_kv_cache_config([self.cache_config]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            hash_block_size=hash_block_size,
        )

    def check_counts(self) -> None:
        """Every block is held as often as tables of requests name it, or it is free.

        Raises:
            WrongAnswer: One is not.
        """
        manager = self.scheduler.kv_cache_manager
        tables = [m.req_to_blocks for m in manager.coordinator.single_type_managers]
        named = Counter(block.block_id for table in tables for held in table.values() for block in held)
        pool = manager.block_pool
        wrong = [b.block_id for b in pool.blocks if b.ref_cnt != named[b.block_id] and not b.is_null]
        num_free = pool.get_num_free_blocks()
        strangers = {name for table in tables for name, held in table.items() if held} - self.scheduler.requests.keys()
        if wrong or strangers or num_free != self.num_free - len(named):
            raise WrongAnswer(
                f"leak: {wrong} are not held as often as tables name them, {num_free} of {self.num_free} blocks are "
                f"free beside {len(named)} that are named, {sorted(strangers)} have blocks and are no requests"
            )

    def leaks(self) -> str | None:
        """What is still held though no request is left."""
        manager = self.scheduler.kv_cache_manager
        free = manager.block_pool.get_num_free_blocks()
        held = [block.block_id for block in manager.block_pool.blocks if block.ref_cnt and not block.is_null]
        tables = [m.req_to_blocks for m in manager.coordinator.single_type_managers]
        if free == self.num_free and not held and not any(tables) and not self.scheduler.requests:
            return None
        return f"{free} of {self.num_free} blocks are free, held are {held}, tables {tables}"


class Poison:
    """NaN in pages and states that nobody holds, of a share of the blocks: when they are freed, and when they are
    handed out. The others keep what they held, which is as wrong and looks right."""

    def __init__(self, pool: Any, memory: list[torch.Tensor], share: float, draw: random.Random) -> None:
        self._memory, self._share, self._draw = memory, share, draw
        self.counts: Counter[str] = Counter()
        free, get = pool.free_blocks, pool.get_new_blocks

        def free_blocks(blocks: Iterable[Any]) -> None:
            blocks = list(blocks)
            free(blocks)
            # Cached ones may be found again.
            self._fill([b.block_id for b in blocks if b.ref_cnt == 0 and b.block_hash is None and not b.is_null])

        def get_new_blocks(count: int) -> list[Any]:
            blocks = get(count)
            self._fill([block.block_id for block in blocks])
            return blocks

        pool.free_blocks, pool.get_new_blocks = free_blocks, get_new_blocks

    def _fill(self, ids: list[int]) -> None:
        chosen = [i for i in ids if self._draw.random() < self._share]
        self.counts["poisoned_blocks"] += len(chosen)
        for cache in self._memory:
            for i in chosen:
                cache[i] = torch.nan


class Heirs:
    """Half of the requests get the blocks that a former one had, as far as they are free: its pages in the same places,
    and its state. vLLM's order of free blocks seldom does so, and nothing may depend on it: here lies what looks most
    like a request's own."""

    def __init__(self, pool: Any, managers: tuple[Any, ...], draw: random.Random) -> None:
        self._queue, self._draw = pool.free_block_queue, draw
        self._former: dict[str, dict[int, list[Any]]] = {}  # by request and group, the last ones
        self._heir_of: dict[str, dict[int, list[Any]]] = {}
        self.counts: Counter[str] = Counter()
        for group, manager in enumerate(managers):
            self._watch(group, manager)

    def _watch(self, group: int, manager: Any) -> None:
        allocate, pop = manager.allocate_new_blocks, manager.pop_blocks_for_free

        def allocate_new_blocks(request_id: str, *args: Any, **kwargs: Any) -> list[Any]:
            held = len(manager.req_to_blocks.get(request_id, ()))
            self._offer(self._predecessor(request_id).get(group, [])[held:])
            return allocate(request_id, *args, **kwargs)

        def pop_blocks_for_free(request_id: str) -> list[Any]:
            blocks = pop(request_id)
            self._former.setdefault(request_id, {})[group] = list(blocks)
            self._heir_of.pop(request_id, None)
            while len(self._former) > 8:
                del self._former[next(iter(self._former))]
            return blocks

        manager.allocate_new_blocks, manager.pop_blocks_for_free = allocate_new_blocks, pop_blocks_for_free

    def _predecessor(self, request_id: str) -> dict[int, list[Any]]:
        if request_id not in self._heir_of:
            others = [blocks for name, blocks in self._former.items() if name != request_id]
            chosen = self._draw.choice(others) if others and self._draw.random() < 0.5 else {}
            self._heir_of[request_id] = chosen
            self.counts["heirs"] += bool(chosen)
        return self._heir_of[request_id]

    def _offer(self, blocks: list[Any]) -> None:
        """Let `blocks` be the first that are handed out, up to one that is held."""
        free = list(itertools.takewhile(lambda block: block.ref_cnt == 0, blocks))
        for block in free:
            self._queue.remove(block)
        self._queue.prepend_n(free)


@contextlib.contextmanager
def quiet() -> Any:
    """vLLM's warnings about its configuration are those of no user."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
