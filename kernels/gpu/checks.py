"""Every case that the kernels of a GPU refuse, each with one sentence."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton.runtime.errors import OutOfResources

from ...algorithm.parameters import SplaParameters
from ...algorithm.selectors import get_selector
from ...algorithm.sketch import FINE_SOURCES, num_chunks
from ...algorithm.statistics_format import MAX_COUNT, STATISTICS_DTYPES
from .capability import LEAST
from .feature_maps import gpu_feature_map
from .residual import RESIDUAL_CODES
from .selectors import gpu_selector

FLASHINFER_HEAD_SIZES = (64, 128, 256)
FINE_BLOCKS = (16, 32, 64)
MAX_SKETCH_COLUMNS = 128
"""Of a matrix product with sketches: chunks of a key times heads of a group, each as a power of two."""


def check_options(
    params: SplaParameters,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    cache_dtype: torch.dtype,
    max_query_len: int,
    max_model_len: int,
    executor: str,
    capability: tuple[int, int] | None,
) -> None:
    """Refuse options before there is a device to make kernels on.

    Args:
        params: What to compute.
        num_heads: Query heads.
        num_kv_heads: Kv heads.
        head_size: `d`.
        cache_dtype: Dtype of the cache.
        max_query_len: The most query tokens of a decode row.
        max_model_len: The most tokens of a sequence.
        executor: What attends to the selected pages, see `SplaOptions`.
        capability: Compute capability of the GPU; None where nobody could say.

    Raises:
        ValueError: These parameters, or this GPU, by name.
    """
    if capability is not None:
        check_capability(capability)
    try:
        check_layer(params, num_heads, num_kv_heads, head_size, cache_dtype)
        check_decode(params, head_size, max_query_len, max_model_len, executor)
    except ValueError as error:
        raise ValueError(f"SPLA on a GPU does not compute these options: {error}") from None
    if params.residual == "linear" and head_size > 128:
        raise ValueError(
            f"SPLA's residual 'linear' has no prefill on a GPU for heads of {head_size}, its matrices exceed shared "
            "memory: choose residual 'regression' or 'none'"
        )


def check_capability(capability: tuple[int, int]) -> None:
    """Raises:
    ValueError: A GPU that the kernels do not run on.
    """
    if capability < LEAST:
        raise ValueError(
            f"SPLA has no kernels for a GPU of compute capability {'.'.join(map(str, capability))}, which has no "
            f"bfloat16 on tensor cores: use a GPU of {'.'.join(map(str, LEAST))} (Ampere) or later, or remove "
            "--attention-backend spla"
        )


@contextmanager
def refuse_what_does_not_fit(head_size: int, capability: tuple[int, int]) -> Iterator[None]:
    """Around the warm-up of a layer, where its kernels are loaded for the first time.

    Raises:
        ValueError: A kernel needs more of the GPU than a thread block may have. Launch shapes are such that what
            `tests/kernels/test_compiles.py` compiles does not.
    """
    try:
        yield
    except OutOfResources as error:
        raise ValueError(
            f"SPLA's kernels for heads of {head_size} and these options do not fit on a GPU of compute capability "
            f"{'.'.join(map(str, capability))}, one needs {error.required} of {error.name} and gets {error.limit}: "
            "choose other SPLA options (fine_block_size 0 needs less), or remove --attention-backend spla"
        ) from None


def check_layer(
    params: SplaParameters, num_heads: int, num_kv_heads: int, head_size: int, cache_dtype: torch.dtype
) -> None:
    """Raises:
    ValueError: No kernel computes this.
    """
    if params.page_size % 16 != 0:
        raise ValueError(f"page_size {params.page_size} is no multiple of 16")
    if params.selection_block % 16 != 0 or params.page_size % params.selection_block != 0:
        raise ValueError(
            f"selection_block {params.selection_block} is no multiple of 16 that divides page_size {params.page_size}"
        )
    if params.fine_block:
        check_two_levels(params, num_heads // num_kv_heads, head_size)
    if params.statistics_dtype not in STATISTICS_DTYPES:
        raise ValueError(
            f"statistics_dtype {params.statistics_dtype!r} has no kernel, choose one of {', '.join(STATISTICS_DTYPES)}"
        )
    selector = get_selector(params.selector)
    if params.statistics_dtype == "fp8" and selector.counts_keys and params.selection_block > MAX_COUNT:
        raise ValueError(
            f"selection_block {params.selection_block}: statistics_dtype 'fp8' counts up to {MAX_COUNT} keys "
            "of a cluster"
        )
    gpu_selector(params.selector)
    if params.residual not in RESIDUAL_CODES:
        raise ValueError(f"residual {params.residual!r} has no kernel, choose one of {', '.join(RESIDUAL_CODES)}")
    if params.residual == "linear":
        gpu_feature_map(params.feature_map)
    if params.combine not in ("shared_normalizer", "double_rmsnorm"):
        raise ValueError(f"combine {params.combine!r} has no kernel")
    if not selector.has_mass and params.residual != "none" and params.combine == "shared_normalizer":
        raise ValueError(f"selector {params.selector!r} gives no tail mass: use residual 'none'")
    if params.budget_blocks < params.max_forced_blocks:
        raise ValueError(f"budget_blocks {params.budget_blocks} is below {params.max_forced_blocks} forced blocks")
    if num_heads % num_kv_heads != 0:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} kv heads")
    if head_size % 16 != 0 or head_size > 256:
        raise ValueError(f"head_size {head_size} is no multiple of 16 up to 256")
    if cache_dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"cache_dtype {cache_dtype} is neither float16 nor bfloat16")


def check_two_levels(params: SplaParameters, group: int, head_size: int) -> None:
    """Raises:
    ValueError: Fine blocks, or a sketch of keys, that no kernel takes.
    """
    block, fine = params.selection_block, params.fine_block
    if fine not in FINE_BLOCKS:
        raise ValueError(
            f"fine_block_size {fine} has no kernel, choose one of {', '.join(map(str, FINE_BLOCKS))}, or 0"
        )
    if block % fine != 0 or block // fine & (block // fine - 1) or block // fine > 64:
        raise ValueError(
            f"selection blocks of {block} tokens are not 1, 2, 4, up to 64 fine blocks of {fine}: choose another "
            "fine_block_size or selection_block_size"
        )
    if params.fine_source not in FINE_SOURCES:
        raise ValueError(f"fine_source {params.fine_source!r} has no kernel, choose one of {', '.join(FINE_SOURCES)}")
    if params.has_sketch and not get_selector(params.selector).mean_first:
        raise ValueError(
            f"fine_source {params.fine_source!r} has no kernel with selector {params.selector!r}, whose statistics do "
            "not begin with the mean key: set fine_source to 'keys', or choose another selector"
        )
    largest = MAX_SKETCH_COLUMNS >> (num_chunks(head_size) - 1).bit_length()
    if params.has_sketch and group > largest:
        raise ValueError(
            f"fine_source {params.fine_source!r} has no kernel for {group} query heads a kv head of {head_size}, only "
            f"up to {largest}: set fine_source to 'keys'"
        )


def check_decode(params: SplaParameters, head_size: int, max_query_len: int, max_model_len: int, executor: str) -> None:
    """Raises:
    ValueError: Decode rows that no kernel takes, or an executor that is not there.
    """
    if max_query_len > params.page_size:
        raise ValueError(f"{max_query_len} query tokens a row exceed a page of {params.page_size}")
    if -(-max_model_len // params.page_size) * params.blocks_per_page >= 1 << 16:  # selection counts in 16 bits
        raise ValueError(
            f"max_model_len {max_model_len} is more than 65535 selection blocks of {params.selection_block} tokens"
        )
    candidates = params.candidate_blocks * params.selection_block
    if params.fine_block and candidates // params.fine_block >= 1 << 16:
        raise ValueError(
            f"candidates of {candidates} tokens are more than 65535 fine blocks of {params.fine_block}: set "
            "candidates, budget or fine_block_size to something else"
        )
    if executor == "flashinfer":
        if params.fine_block:
            raise ValueError(
                f"executor 'flashinfer' reads whole pages, no fine blocks of {params.fine_block} tokens: set executor "
                "to 'spla' or fine_block_size to 0"
            )
        if params.selection_block != params.page_size:
            raise ValueError(
                f"executor 'flashinfer' reads whole pages: set selection_block_size to {params.page_size} or executor "
                "to 'spla'"
            )
        check_flashinfer(head_size)
    elif executor != "spla":
        raise ValueError(f"executor {executor!r} is neither spla nor flashinfer")


def check_flashinfer(head_size: int) -> None:
    """Raises:
    ValueError: FlashInfer is not installed, or has no kernel for this head size.
    """
    if importlib.util.find_spec("flashinfer") is None:
        raise ValueError("executor 'flashinfer' needs the package flashinfer-python, which is not installed")
    if head_size not in FLASHINFER_HEAD_SIZES:
        raise ValueError(f"executor 'flashinfer' has no kernel for head_size {head_size}, only {FLASHINFER_HEAD_SIZES}")
