"""Bytes of a page and of a recurrent-state block: the one place that knows offsets (docs/design.md, 5 and 6)."""

import os
from dataclasses import dataclass

import torch

from ..algorithm.parameters import SplaParameters
from ..algorithm.residual import make_residual
from ..algorithm.selectors import get_selector, stored_formats
from ..algorithm.sketch import BYTES_PER_CHUNK, CHUNK, num_chunks, sketch, unsketch
from ..algorithm.statistics_format import Formats, decode, encode

STAMP_WORDS = 4  # int32: salt_lo, salt_hi, counter, page id
STATE_MAGIC = 0x53504C41  # "SPLA"
STATE_HEADER_WORDS = 8  # int32: magic, covered pages, stamp[4], block ordinal, 0


def new_salt() -> torch.Tensor:
    """What the stamps of a layer's pages have in common, `[2]` int32. Not from torch's generator, which engines seed:
    pages of two engines must not bear the same stamp."""
    return torch.frombuffer(bytearray(os.urandom(8)), dtype=torch.int32)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class PageLayout:
    """Geometry of one page of one kv head: `[page_size + statistics_rows, 2 * head_size]`.

    Attributes:
        page_size: Tokens a page, vLLM's block size.
        head_size: Size of a key and of a value.
        itemsize: Bytes of one element of the cache dtype.
        selection_block: Tokens a selection block; divides `page_size`.
        statistics_width: Elements a selection block's statistics take (`Selector.width`).
        formats: How they are stored where they take a byte each; None: in the cache dtype.
        has_sketch: Whether a sketch of the keys follows them (`algorithm/sketch.py`).
    """

    page_size: int
    head_size: int
    itemsize: int
    selection_block: int
    statistics_width: int
    formats: Formats | None = None
    has_sketch: bool = False

    @property
    def blocks_per_page(self) -> int:
        return self.page_size // self.selection_block

    @property
    def fp8_statistics(self) -> bool:
        """Whether statistics take a byte an element (the option `statistics_dtype: fp8`)."""
        return self.formats is not None

    @property
    def statistics_itemsize(self) -> int:
        """Bytes of one stored element of statistics."""
        return 1 if self.fp8_statistics else self.itemsize

    @property
    def statistics_stride(self) -> int:
        """Stored elements from one block's statistics to the next: each set begins at a multiple of 16 bytes."""
        unit = 16 // self.statistics_itemsize
        return _ceil_div(self.statistics_width, unit) * unit

    @property
    def statistics_bytes(self) -> int:
        """Bytes of the statistics, a multiple of 16."""
        return self.blocks_per_page * self.statistics_stride * self.statistics_itemsize

    @property
    def sketch_begin(self) -> int:
        """Bytes from the begin of the statistics to the sketch; 0 where there is none."""
        return self.statistics_bytes if self.has_sketch else 0

    @property
    def sketch_scales(self) -> int:
        """Bytes from the begin of the sketch to its scales, behind all tokens' codes."""
        return self.page_size * num_chunks(self.head_size) * CHUNK // 2

    @property
    def sketch_bytes(self) -> int:
        """Bytes of the sketch, a multiple of 16."""
        return self.page_size * num_chunks(self.head_size) * BYTES_PER_CHUNK if self.has_sketch else 0

    @property
    def statistics_rows(self) -> int:
        """Rows of `2 * head_size` elements behind a page's tokens (`r` in docs/design.md)."""
        used = self.statistics_bytes + self.sketch_bytes + STAMP_WORDS * 4
        return _ceil_div(used, 2 * self.head_size * self.itemsize)

    def area(self, pages: torch.Tensor) -> torch.Tensor:
        """Statistics areas `[..., statistics_rows * 2 * head_size]` of pages `[..., rows, 2 * head_size]`, a view."""
        return pages[..., self.page_size :, :].flatten(-2)

    def stored(self, area: torch.Tensor) -> torch.Tensor:
        """Statistics as they are stored, `[..., blocks_per_page, statistics_width]`: a view of an area that begins with
        them and is whole or shorter."""
        if self.fp8_statistics:
            area = area.view(torch.uint8)
        used = area[..., : self.blocks_per_page * self.statistics_stride]
        return used.unflatten(-1, (self.blocks_per_page, self.statistics_stride))[..., : self.statistics_width]

    def load(self, area: torch.Tensor) -> torch.Tensor:
        """Statistics `[..., blocks_per_page, statistics_width]` float32 of an area."""
        stored = self.stored(area)
        return stored.float() if self.formats is None else decode(stored, self.formats)

    def store(self, area: torch.Tensor, statistics: torch.Tensor) -> None:
        """Write statistics `[..., blocks_per_page, statistics_width]` float32 into an area, rounded."""
        if self.formats is None:
            limit = torch.finfo(area.dtype).max
            self.stored(area)[:] = statistics.clamp(-limit, limit).to(area.dtype)
        else:
            self.stored(area)[:] = encode(statistics, self.formats)

    def statistics(self, pages: torch.Tensor) -> torch.Tensor:
        """Statistics `[..., blocks_per_page, statistics_width]` float32 in pages `[..., rows, 2 * head_size]`."""
        return self.load(self.area(pages))

    def sketch(self, area: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `[..., page_size, chunks * 16]` uint8 and scales `[..., page_size, chunks]` float16 in a whole area,
        views (`algorithm.sketch.sketch`)."""
        begin, chunks = self.sketch_begin, num_chunks(self.head_size)
        of_sketch = area.view(torch.uint8)[..., begin : begin + self.sketch_bytes]
        codes, scales = of_sketch[..., : self.sketch_scales], of_sketch[..., self.sketch_scales :].view(torch.float16)
        return codes.unflatten(-1, (self.page_size, -1)), scales.unflatten(-1, (self.page_size, chunks))

    def store_sketch(self, area: torch.Tensor, keys: torch.Tensor) -> None:
        """Write the sketch of keys `[..., page_size, head_size]` float32 into a whole area that holds their mean."""
        for held, new in zip(self.sketch(area), sketch(keys, self._centre(area)), strict=True):
            held[:] = new

    def sketched_keys(self, area: torch.Tensor) -> torch.Tensor:
        """What the sketch in a whole area says the keys are, `[..., page_size, head_size]` float32."""
        return unsketch(*self.sketch(area), self._centre(area))

    def _centre(self, area: torch.Tensor) -> torch.Tensor:
        """The mean that each key of a page counts from, `[..., page_size, head_size]` float32."""
        return self.load(area)[..., : self.head_size].repeat_interleave(self.selection_block, -2)

    @property
    def rows(self) -> int:
        return self.page_size + self.statistics_rows

    @property
    def stamp_offset(self) -> int:
        """First element of the stamp within the flat statistics area."""
        return self.statistics_rows * 2 * self.head_size - STAMP_WORDS * 4 // self.itemsize

    @property
    def stamp_word(self) -> int:
        """First int32 of the stamp within a page of one kv head."""
        return self.rows * 2 * self.head_size * self.itemsize // 4 - STAMP_WORDS


@dataclass(frozen=True)
class StateLayout:
    """Geometry of a request's recurrent state of one kv head over `num_blocks` blocks.

    Attributes:
        page: Geometry of the pages whose pool the blocks come from.
        s_rows: Rows of `S`, each `[head_size]` float32 (`F_S`).
        z_size: Elements of `z` (`F_z`); 0 where no normaliser is kept.
    """

    page: PageLayout
    s_rows: int
    z_size: int

    @property
    def rows_per_block(self) -> int:
        """Rows of `head_size` float32 in one block of one kv head, header row included (`R`)."""
        return self.page.rows * self.page.itemsize // 2

    @property
    def z_rows(self) -> int:
        return _ceil_div(self.z_size, self.page.head_size)

    @property
    def body_rows(self) -> int:
        return self.s_rows + self.z_rows

    @property
    def num_blocks(self) -> int:
        """Blocks a request holds (`K`)."""
        return _ceil_div(self.body_rows, self.rows_per_block - 1)


def layouts(params: SplaParameters, head_size: int, dtype: torch.dtype) -> tuple[PageLayout, StateLayout]:
    """Pages and recurrent states of a layer whose cache is of `dtype`; without a residual the state has no rows."""
    width, formats = get_selector(params.selector).width(head_size), stored_formats(params, head_size)
    page = PageLayout(
        params.page_size, head_size, dtype.itemsize, params.selection_block, width, formats, params.has_sketch
    )
    residual = make_residual(params, head_size)
    s_rows, z_size = (residual.s_rows, residual.z_size) if residual else (0, 0)
    return page, StateLayout(page, s_rows, z_size)
