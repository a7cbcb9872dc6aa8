"""The attention backend as vLLM sees it: names, supported sizes, the cache spec with its statistics rows."""

from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout, KVCacheSpec

from ..kernels.layout import PageLayout, StateLayout, layouts
from ..options import SplaOptions
from .builder import SplaMetadataBuilder
from .checks import PREFERRED_PAGE_SIZE, SUPPORTED_HEAD_SIZES, SUPPORTED_KV_CACHE_DTYPES
from .impl import SplaImpl
from .registration import BACKEND_NAME


class SplaBackend(AttentionBackend):
    """SPLA, block Sparse Plus Linear Attention (arXiv 2601.22379).

    vLLM asks a layer's backend, a class, for the layer's cache spec, and hands it no configuration. So every layer
    holds a subclass that knows its options, and two models of one process may have different ones.
    """

    options: ClassVar[SplaOptions | None] = None
    """Of the layers that hold this class; None in what vLLM's selection returns, before weights are loaded."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list] = list(SUPPORTED_KV_CACHE_DTYPES)
    # Statistics are made where keys are written, and need the page's other keys in place.
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    @cache
    def with_options(options: SplaOptions) -> "type[SplaBackend]":
        """The backend of layers with these options, the same class for the same options."""
        return type(SplaBackend.__name__, (SplaBackend,), {"options": options, "__module__": __name__})

    @classmethod
    def layouts(cls, spec: AttentionSpec) -> tuple[PageLayout, StateLayout]:
        """Bytes of the pages and of the recurrent state of a layer that holds this class.

        Raises:
            RuntimeError: No layer does, this is the class without options.
        """
        if cls.options is None:
            raise RuntimeError("the cache spec of an SPLA layer is asked for before its weights were loaded")
        return layouts(cls.options.parameters(spec.block_size), spec.head_size, spec.dtype)

    @staticmethod
    def get_name() -> str:
        """See `AttentionBackend.get_name`; vLLM looks the enum member up by it."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[SplaImpl]:
        """See `AttentionBackend.get_impl_cls`."""
        return SplaImpl

    @staticmethod
    def get_builder_cls() -> type[SplaMetadataBuilder]:
        """See `AttentionBackend.get_builder_cls`."""
        return SplaMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """See `AttentionBackend.get_supported_head_sizes`."""
        return list(SUPPORTED_HEAD_SIZES)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """Any multiple of 16 tokens, never split: a page's statistics stand behind its last token."""
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """64 tokens, where vLLM is free to choose."""
        return PREFERRED_PAGE_SIZE

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head-major pages, one after the other.

        A (page, head) is then a page of FlashInfer's with the id `page * G + head`, and a state's rows are dense.
        """
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sink(cls) -> bool:
        """Learned sinks are a term of the denominator."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Not yet."""
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Give every page `r` rows more than it has tokens, for its statistics and stamp.

        The rows are the page's own, so that the engine accounts for, caches, offloads and copies them with it.
        Specs of layers that SPLA does not compute come back unchanged, and so do those of fewer than 16 tokens,
        with which vLLM only asks for the bytes of a token.
        """
        if type(spec) is not FullAttentionSpec or spec.block_size < 16:
            return spec
        layout, _ = cls.layouts(spec)
        return replace(spec, tokens_per_state=Fraction(layout.page_size, layout.rows))
