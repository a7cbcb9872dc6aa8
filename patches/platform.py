"""Let vLLM's platforms hand layers to SPLA, and check a configuration before a process is started for it.

Upstream cause, vLLM 0.32 and 0.33:

* `CpuPlatform.get_attn_backend_cls` ignores the chosen backend and always returns CPU_ATTN.
* All platforms ask the one chosen backend for every layer of a model, so that models which mix full attention with
  sliding windows or encoders could not use a backend for full attention only (`backend_per_kind` can say so, but
  the user would have to).
* No hook lets a backend look at the whole configuration at start-up; `check_and_update_config` is where platforms do.
  Nor at the layers of a loaded model; `update_block_size_for_backend` is where platforms do.
* vLLM asks a backend for its preferred page size only where all layers share one backend, and the companion layers of
  the recurrent state count as another: without this patch pages would be of 16 tokens.

Remove when the CPU platform honours `attention_config.backend` for registered backends, and backends have a hook
for validation and for the layers they decline.
"""

import functools
from typing import Any

WHERE = "all models"
INTERFACES = (
    "vllm.platforms:current_platform.get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)",
    "vllm.platforms:current_platform.check_and_update_config(vllm_config)",
    "vllm.platforms:current_platform.update_block_size_for_backend(vllm_config)",
)


def apply() -> None:
    """Wrap three class methods of the current platform; a second call does nothing."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if getattr(platform.get_attn_backend_cls, "_spla", False):
        return
    _wrap(platform, "get_attn_backend_cls", _get_attn_backend_cls)
    _wrap(platform, "check_and_update_config", _check_and_update_config)
    _wrap(platform, "update_block_size_for_backend", _update_block_size_for_backend)


def _wrap(platform: type, name: str, wrapper: Any) -> None:
    original = getattr(platform, name).__func__  # of the class that defines it

    @functools.wraps(original)
    def method(cls: type, *args: Any, **kwargs: Any) -> Any:
        return wrapper(functools.partial(original, cls), *args, **kwargs)

    method._spla = True  # type: ignore[attr-defined]
    setattr(platform, name, classmethod(method))


def _get_attn_backend_cls(
    original: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
) -> str:
    from ..engine.checks import covers_layer, refuse_layer
    from ..engine.registration import BACKEND_PATH, backend_member
    from . import local_attention

    if selected_backend is not backend_member():
        return original(selected_backend, attn_selector_config, num_heads)
    if not covers_layer(attn_selector_config):
        return original(None, attn_selector_config, num_heads)
    refuse_layer(attn_selector_config)
    local_attention.apply()
    return BACKEND_PATH


def _check_and_update_config(original: Any, vllm_config: Any) -> None:
    from ..engine.checks import choose_page_size, is_chosen, refuse_config

    chosen = is_chosen(vllm_config)
    if chosen:
        choose_page_size(vllm_config)
    original(vllm_config)
    if chosen:
        refuse_config(vllm_config)


def _update_block_size_for_backend(original: Any, vllm_config: Any) -> None:
    from ..engine.checks import is_chosen, warn_if_unused

    original(vllm_config)
    if is_chosen(vllm_config):
        warn_if_unused(vllm_config)
