"""Decode with FlashInfer for the exact part: it reads the page tables that selection writes, and is planned once.

Every (query token, kv head) is a request of FlashInfer's with one query token and one kv head, over the cache seen as
`[pages * G, 1, B + r, 2 d]`. What `plan` fixes, the partition of the requests among programs, is made for requests of
`budget` pages each, so that `indptr` never changes. What changes from step to step, FlashInfer reads on the device:

* the page ids: its index buffer is our page table;
* the lengths. It takes `(indptr[i + 1] - indptr[i] - 1) * B + last_page_len[i]` tokens for request `i`, in integers
  that may be negative. `pack_kernel` writes `last_page_len` so that this is the number of tokens that there are: rows
  with fewer pages than the budget and top-p are lists that end early, padding is a request of no tokens. Programs
  planned for what is beyond the end find nothing to do, and their empty share is merged with weight zero.

So no step plans, copies tables, or waits for the host, and steps can be captured in CUDA graphs. (Programmatic
dependent launch stays off: FlashInfer reads the lengths before it waits for the launch that wrote them.)

After `prepare` and selection (`steps`), a step launches

1. `pack_kernel`: query tokens side by side, and the lengths;
2. FlashInfer's attention, in two kernels where it splits: outputs in the cache dtype, and the LSE to base 2;
3. `subtract_kernel`: `phi(q) S_selected` over the same pages, then the combination of `attend`, to which
   FlashInfer's result is the exact part of the first split.

Plain reference: as `attend`. Floor: as there, plus the selected pages a second time (from L2) where there is a
residual. Source: FlashInfer, `BatchDecodeWithPagedKVCacheWrapper` with CUDA graphs (arXiv 2501.01005).
"""

from collections.abc import Callable
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
import triton
import triton.language as tl

from ..feature_maps import map_features
from ..layer import GpuLayer
from ..residual import LINEAR, NO_RESIDUAL
from .attend import attend_constants, clear_padding, mass_of_rest, mass_programs, merge_splits
from .residual import subtract_weights
from .tuning import DecodeSizes, Tuning


@triton.jit
def pack_kernel(
    query_ptr,  # [tokens, H, D]
    packed_ptr,  # [slots, H, D] in the cache dtype
    query_start_loc_ptr,
    seq_lens_ptr,
    count_ptr,  # [tokens, G] int32
    last_page_len_ptr,  # [slots, G] int32
    num_rows,
    query_token_stride,
    query_head_stride,
    num_kv_heads,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BUDGET: tl.constexpr,
):
    """Grid (G, slots), where slots behind the tokens of all rows are padding."""
    head = tl.program_id(0)
    slot = tl.program_id(1)
    row = slot // QUERY_LEN
    token_in_row = slot % QUERY_LEN
    in_batch = row < num_rows
    first_token = tl.load(query_start_loc_ptr + row, mask=in_batch, other=0)
    query_len = tl.load(query_start_loc_ptr + row + 1, mask=in_batch, other=0) - first_token
    if token_in_row < query_len:
        token = (first_token + token_in_row).to(tl.int64)
        seq_len = tl.load(seq_lens_ptr + row)
        position = seq_len - query_len + token_in_row
        count = tl.load(count_ptr + token * num_kv_heads + head, mask=seq_len > 0, other=0)
        length = tl.where(seq_len > 0, (count - 1) * PAGE + position % PAGE + 1, 0)
        tl.store(last_page_len_ptr + token * num_kv_heads + head, length - (BUDGET - 1) * PAGE)
        member = tl.arange(0, GROUP_P)
        column = tl.arange(0, DP)
        mask = (member < GROUP)[:, None] & (column < D)[None, :]
        head_row = (head * GROUP + member)[:, None]
        query = query_ptr + token * query_token_stride + head_row * query_head_stride + column[None, :]
        packed = packed_ptr + (token * num_kv_heads * GROUP + head_row) * D + column[None, :]
        tl.store(packed, tl.load(query, mask=mask, other=0.0).to(packed_ptr.dtype.element_ty), mask=mask)
    if slot >= tl.load(query_start_loc_ptr + num_rows):
        tl.store(last_page_len_ptr + slot.to(tl.int64) * num_kv_heads + head, -(BUDGET - 1) * PAGE)


@triton.jit
def _subtract_split(
    split,
    num_splits,
    token,
    head,
    num_subtract,  # tokens of the table that the state covers
    query_ptr,
    kv_ptr,
    table_ptr,
    exact_ptr,  # [slots, H, D] in the cache dtype
    lse_ptr,  # [slots, H] float32, to base 2
    part_out_ptr,  # as in `attend.attend_split`
    part_sum_ptr,
    part,
    query_token_stride,
    query_head_stride,
    page_stride,
    head_stride,
    num_kv_heads,
    scale,
    GROUP: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    TABLE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PHI: tl.constexpr,
):
    """One split as `attend.attend_split` leaves it, but for the exact part, which is FlashInfer's."""
    dtype = kv_ptr.dtype.element_ty
    n = tl.arange(0, N)
    column = tl.arange(0, DP)
    in_head = column < D
    total = tl.zeros([N], dtype=tl.float32)
    out = tl.zeros([N, DP], dtype=tl.float32)
    if RESIDUAL != NO_RESIDUAL:
        query_row = query_ptr + token * query_token_stride + (head * GROUP + n % C) * query_head_stride  # [N]
        q_mask = (n % C < GROUP)[None, :] & in_head[:, None]
        q = tl.load(query_row[None, :] + column[:, None], mask=q_mask, other=0.0).to(dtype)  # [DP, N]
        if RESIDUAL == LINEAR:
            q = map_features(PHI, q.to(tl.float32) * scale, in_head[:, None], 0).to(dtype)
        kind = (n // C)[None, :]
        per_split = tl.cdiv(tl.cdiv(num_subtract, TILE), num_splits) * TILE
        stop = tl.minimum((split + 1) * per_split, num_subtract)
        table = table_ptr + (token * num_kv_heads + head) * TABLE
        kv = kv_ptr + head * head_stride
        for first in tl.range(split * per_split, stop, TILE, num_stages=STAGES):
            t = first + tl.arange(0, TILE)
            covered = (t < stop)[:, None]
            page = (tl.load(table + t // PAGE, mask=t < stop, other=0) // num_kv_heads).to(tl.int64)
            rows = kv + (page * page_stride + (t % PAGE) * 2 * D)[:, None] + column[None, :]  # [TILE, DP]
            k = tl.load(rows, mask=covered & in_head[None, :], other=0.0)
            v = tl.load(rows + D, mask=covered & in_head[None, :], other=0.0)
            if RESIDUAL == LINEAR:
                phi_k = map_features(PHI, k.to(tl.float32), in_head[None, :], 1).to(dtype)
                feature = tl.dot(phi_k, q)  # [TILE, N]
            else:
                feature = tl.dot(k, q) * scale
            weight = subtract_weights(feature, kind, covered, dtype)
            total += tl.sum(tl.where(covered & (kind > 0), feature, 0.0), axis=0)
            out = tl.dot(tl.trans(weight), v, out)

    # The whole of the exact part is in the first split: the others have the weight exp(-inf).
    exact_group = n < tl.where(split == 0, GROUP, 0)
    head_row = token * num_kv_heads * GROUP + head * GROUP + n  # [N]
    exact = exact_ptr + head_row[:, None] * D + column[None, :]
    out += tl.load(exact, mask=exact_group[:, None] & in_head[None, :], other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + head_row, mask=exact_group, other=float("-inf")) * 0.6931471805599453
    tl.store(part_out_ptr + (part * N + n[:, None]) * DP + column[None, :], out)
    tl.store(part_sum_ptr + part * 2 * N + n, lse)
    tl.store(part_sum_ptr + part * 2 * N + N + n, tl.where(exact_group, 1.0, total))


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def subtract_kernel(
    query_ptr,
    kv_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    table_ptr,
    count_ptr,
    flags_ptr,
    mass_ptr,
    exact_ptr,
    lse_ptr,
    part_out_ptr,
    part_sum_ptr,
    rest_mass_ptr,
    read_ptr,
    read_z_ptr,
    read_v_ptr,
    arrivals_ptr,  # [tokens, G] int32, zero between launches
    gain_ptr,
    sink_ptr,
    exact_weight_ptr,
    tail_weight_ptr,
    output_ptr,
    num_rows,
    num_tokens,  # of the output
    query_token_stride,
    query_head_stride,
    output_token_stride,
    output_head_stride,
    page_stride,
    head_stride,
    max_units,
    num_kv_heads,
    scale,
    residual_scale,
    norm_eps,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    TABLE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    SLICES: tl.constexpr,
    MASS_SPLITS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PHI: tl.constexpr,
    HAS_MASS: tl.constexpr,
    MASS_WIDTH: tl.constexpr,
    DOUBLE_NORM: tl.constexpr,
):
    """Grid (SPLITS + MASS_SPLITS, G, rows * QUERY_LEN); the last program of a (token, kv head) to arrive combines."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2) // QUERY_LEN
    token_in_row = tl.program_id(2) % QUERY_LEN
    seq_len = tl.load(seq_lens_ptr + row)
    first_token = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - first_token
    if (seq_len > 0) & (token_in_row < query_len):
        token = (first_token + token_in_row).to(tl.int64)
        num_complete = (seq_len - query_len + token_in_row) // PAGE
        count = tl.load(count_ptr + token * num_kv_heads + head)
        has_rest = num_complete >= count
        num_subtract = tl.where(has_rest, (count - 1) * PAGE, 0)  # all but the current page, which no state has
        splits = tl.maximum(tl.minimum(SPLITS, tl.cdiv(num_subtract, TILE)), 1)
        part = (tl.program_id(2).to(tl.int64) * num_kv_heads + head) * SPLITS
        programs = splits
        works = split < splits
        if HAS_MASS:
            programs = tl.where(has_rest, splits + MASS_SPLITS, splits)
            if (split >= SPLITS) & has_rest:
                mass_of_rest(
                    token * num_kv_heads + head, split - SPLITS, num_complete, flags_ptr, mass_ptr, rest_mass_ptr,
                    max_units, GROUP, GROUP_P, MASS_WIDTH, MASS_SPLITS, 1,
                )  # fmt: skip
                works = split >= SPLITS
        if split < splits:
            _subtract_split(
                split, splits, token, head, num_subtract, query_ptr, kv_ptr, table_ptr, exact_ptr, lse_ptr,
                part_out_ptr, part_sum_ptr, part + split,
                query_token_stride, query_head_stride, page_stride, head_stride, num_kv_heads, scale,
                GROUP, C, N, D, DP, PAGE, TABLE, TILE, STAGES, RESIDUAL, PHI,
            )  # fmt: skip
        if works:
            tl.debug_barrier()  # every thread's partial sums are written before the arrival is announced
            arrivals = arrivals_ptr + tl.program_id(2) * num_kv_heads + head
            if tl.atomic_add(arrivals, 1, sem="acq_rel") == programs - 1:
                tl.store(arrivals, 0)
                merge_splits(
                    splits, token, head, num_complete + 1 - count, part_out_ptr, part_sum_ptr, part,
                    rest_mass_ptr, read_ptr, read_z_ptr, read_v_ptr, gain_ptr, sink_ptr, exact_weight_ptr,
                    tail_weight_ptr, output_ptr, output_token_stride, output_head_stride, num_kv_heads,
                    residual_scale, norm_eps,
                    GROUP, GROUP_P, C, N, D, DP, PAGE, SPLITS, SLICES, MASS_SPLITS, RESIDUAL, HAS_MASS, DOUBLE_NORM,
                )  # fmt: skip
    else:
        clear_padding(
            split, tl.program_id(2), head, query_start_loc_ptr, num_rows, num_tokens, output_ptr,
            output_token_stride, output_head_stride, GROUP, D, DP,
        )  # fmt: skip


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""`attend(query [n, H / G, d], keys, values, out [n, H / G, d], lse [n, H / G])`; keys, values
`[pages * G, 1, B, d]`."""


def plan_flashinfer(
    sizes: list[int],
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    *,
    group: int,
    head_size: int,
    page_size: int,
    dtype: torch.dtype,
    scale: float,
) -> tuple[dict[int, Attend], int]:
    """Plan FlashInfer for numbers of requests; its kernels are compiled now, if they never were.

    Args:
        sizes: Numbers of requests.
        indptr: `[max(sizes) + 1]` int32, `budget` pages a request.
        indices: `[indptr[-1]]` int32, the buffer of page ids that it will read.
        last_page_len: `[max(sizes)]` int32, the buffer of lengths that it will read; overwritten.
        group: Query heads of a request.
        head_size: `d`.
        page_size: `B`.
        dtype: Of queries, keys, values and outputs.
        scale: Softmax scale.

    Returns:
        A function for each size, and the bytes that they hold on the device.
    """
    import flashinfer

    full = torch.full_like(last_page_len, page_size, device="cpu")
    host_indptr = indptr.cpu()
    shape = (group, 1, head_size, page_size)
    dtypes = {"q_data_type": dtype, "kv_data_type": dtype, "sm_scale": scale}
    planned = []
    for n in sizes:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(256, dtype=torch.uint8, device=indptr.device),
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=True,
            backend="fa2",  # the one that reads lengths on the device
            paged_kv_indptr_buffer=indptr[: n + 1],
            paged_kv_indices_buffer=indices,
            paged_kv_last_page_len_buffer=last_page_len[:n],
        )
        table = indices[: int(host_indptr[n])]  # copied to itself
        arguments = (host_indptr[: n + 1], table, full[:n], *shape)
        float_bytes, int_bytes = wrapper.workspace_size(*arguments, **dtypes)
        plan = torch.zeros(int_bytes + 256, dtype=torch.uint8, device=indptr.device)
        wrapper.reset_workspace_buffer(wrapper._float_workspace_buffer, plan)  # instead of 8 MiB
        planned.append((n, wrapper, arguments, plan, float_bytes + 256))
    # Steps run one after the other, so that all sizes share the buffer for partial results; each keeps its plan.
    partial = torch.zeros(max(entry[-1] for entry in planned), dtype=torch.uint8, device=indptr.device)
    nbytes = partial.nbytes
    attends: dict[int, Attend] = {}
    for n, wrapper, arguments, plan, _ in planned:
        wrapper.reset_workspace_buffer(partial, plan)
        wrapper.plan(*arguments, **dtypes)
        nbytes += plan.nbytes

        def attend(query, keys, values, out, lse, run=wrapper.run):
            run(query, (keys, values), out=out, lse=lse, return_lse=True, enable_pdl=False)

        attends[n] = attend
    return attends, nbytes


class FlashInferDecode:
    """What stands in for `attend.attend_kernel` in a step of `DecodeSteps`; layers of one geometry share it.

    Args:
        layer: A layer of the geometry.
        page_table: `[tokens, G, budget]` int32, where selection writes.
    """

    _shared: ClassVar[WeakValueDictionary[tuple, "FlashInferDecode"]] = WeakValueDictionary()

    def __init__(self, layer: GpuLayer, page_table: torch.Tensor) -> None:
        self._page_table = page_table
        tokens, kv_heads, budget = page_table.shape
        # The sizes that vLLM captures, as far as batches go; a step takes the next larger one.
        sizes = {1, 2, 4, *range(8, 256, 8), *range(256, tokens, 64)}
        self._sizes = [*sorted(n for n in sizes if n < tokens), tokens]
        requests, device = tokens * kv_heads, layer.device
        self._indptr = torch.arange(requests + 1, dtype=torch.int32, device=device) * budget
        self.last_page_len = torch.zeros(requests, dtype=torch.int32, device=device)
        self.packed = torch.zeros(requests, layer.group, layer.head_size, dtype=layer.cache_dtype, device=device)
        self.exact = torch.zeros_like(self.packed)
        self.lse = torch.zeros(requests, layer.group, dtype=torch.float32, device=device)
        self._attends, planned = plan_flashinfer(
            [n * kv_heads for n in self._sizes],
            self._indptr,
            page_table.view(-1),
            self.last_page_len,
            group=layer.group,
            head_size=layer.head_size,
            page_size=layer.params.page_size,
            dtype=layer.cache_dtype,
            scale=layer.scale,
        )
        buffers = (self._indptr, self.last_page_len, self.packed, self.exact, self.lse)
        self.nbytes = planned + sum(buffer.nbytes for buffer in buffers)
        # FlashInfer loads kernels and makes constants at its first run, which must not be in a capture. No tokens.
        self.last_page_len.fill_(-(budget - 1) * layer.params.page_size)
        self._run(kv_heads, layer.zeros(1, 1, layer.params.page_size, 2 * layer.head_size))

    @classmethod
    def shared(cls, layer: GpuLayer, page_table: torch.Tensor) -> "FlashInferDecode":
        """That of all layers of this geometry whose selection writes there."""
        key = (page_table.data_ptr(), page_table.shape, layer.params.page_size, layer.head_size, layer.group,
               layer.cache_dtype, layer.scale)  # fmt: skip
        planned = cls._shared.get(key)
        if planned is None:
            planned = cls._shared[key] = cls(layer, page_table)
        return planned

    def _run(self, requests: int, pages: torch.Tensor) -> None:
        keys, values = pages.split(pages.shape[-1] // 2, -1)
        self._attends[requests](self.packed[:requests], keys, values, self.exact[:requests], self.lse[:requests])

    def attend(
        self,
        layer: GpuLayer,
        decode: DecodeSizes,
        scratch: dict[str, torch.Tensor],
        tuning: Tuning,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        output: torch.Tensor,
        max_query_len: int,
    ) -> None:
        """Attend to the selected pages and combine: a step of `layer` whose selection is done, `scratch` and launch
        shapes its own, the others as `DecodeSteps.decode` has them.

        Raises:
            ValueError: The kv heads of a page do not follow each other in memory, as FlashInfer needs them to.
        """
        params, kv_heads, num_rows = layer.params, layer.num_kv_heads, seq_lens.shape[0]
        if kv_cache.stride(0) != kv_heads * kv_cache.stride(1):
            raise ValueError("executor 'flashinfer' needs a cache of head-major pages, one after the other")
        tokens = num_rows * max_query_len
        size = next(n for n in self._sizes if n >= tokens)
        pack_kernel[(kv_heads, size)](
            query_ptr=query,
            packed_ptr=self.packed,
            query_start_loc_ptr=query_start_loc,
            seq_lens_ptr=seq_lens,
            count_ptr=scratch["count"],
            last_page_len_ptr=self.last_page_len,
            num_rows=num_rows,
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            num_kv_heads=kv_heads,
            GROUP=layer.group,
            GROUP_P=layer.group_p,
            QUERY_LEN=max_query_len,
            D=layer.head_size,
            DP=layer.dp,
            PAGE=params.page_size,
            BUDGET=decode.budget,
            num_warps=1,
        )
        pages = kv_cache.view(-1, 1, *kv_cache.shape[2:])[:, :, : params.page_size]  # [pages * G, 1, B, 2 d]
        self._run(size * kv_heads, pages)
        splits = tuning.attend_splits if decode.slices else 1
        subtract_kernel[(splits + mass_programs(layer, tuning), kv_heads, tokens)](
            query_ptr=query,
            kv_ptr=kv_cache,
            query_start_loc_ptr=query_start_loc,
            seq_lens_ptr=seq_lens,
            table_ptr=self._page_table,
            count_ptr=scratch["count"],
            flags_ptr=scratch["flags"],
            mass_ptr=scratch["mass"] if decode.write_mass else scratch["scores"],
            exact_ptr=self.exact,
            lse_ptr=self.lse,
            part_out_ptr=scratch["part_out"],
            part_sum_ptr=scratch["part_sum"],
            rest_mass_ptr=scratch["rest_mass"],
            read_ptr=scratch["read"],
            read_z_ptr=scratch["read_z"],
            read_v_ptr=scratch["read_v"],
            arrivals_ptr=scratch["attend_arrivals"],
            gain_ptr=layer.gain,
            sink_ptr=layer.sinks,
            exact_weight_ptr=layer.norm_weights[0],
            tail_weight_ptr=layer.norm_weights[1],
            output_ptr=output,
            num_rows=num_rows,
            num_tokens=output.shape[0],
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            output_token_stride=output.stride(0),
            output_head_stride=output.stride(1),
            page_stride=kv_cache.stride(0),
            head_stride=kv_cache.stride(1),
            max_units=decode.max_units,
            num_kv_heads=kv_heads,
            scale=layer.scale,
            residual_scale=params.residual_scale,
            norm_eps=params.rms_norm_eps,
            QUERY_LEN=max_query_len,
            SPLITS=splits,
            **attend_constants(layer, decode, tuning),
        )
