"""SPLA over paged memory in vectorised torch: what the CPU engine runs, and the peer of the GPU kernels.

Decode rows are one batch; prefill rows go one after the other in tiles of the tokens of one page, so that all
tokens of a tile share their complete pages and the recurrent state. `plan` does once a step what all layers share.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..algorithm.attention import masked_attention
from ..algorithm.combine import double_rmsnorm, shared_normalizer
from ..algorithm.page_table import PaddedSlots, PageTablePlan, fill_page_table, pad_slots, plan_page_table
from ..algorithm.parameters import SplaParameters
from ..algorithm.residual import Reading, make_residual
from ..algorithm.selection import group_scores, select_blocks
from ..algorithm.selectors import get_selector
from .layout import STAMP_WORDS, STATE_HEADER_WORDS, STATE_MAGIC, PageLayout, StateLayout

_FOLD_PAGES = 64  # pages folded at a time: bounds the scratch of a rebuild


@dataclass(frozen=True)
class Tile:
    """Query tokens that share their complete pages: one decode token a row, or the tokens of one page of one row."""

    rows: torch.Tensor  # [rows] int64, rows of the batch
    tokens: torch.Tensor  # [rows, tokens] int64, where the queries are
    positions: torch.Tensor  # [rows, tokens] int64
    pages: torch.Tensor  # [rows, pages] int64, page ids of the complete pages, 0 where a row has fewer
    num_pages: torch.Tensor  # [rows] int64, complete pages of each row
    complete: torch.Tensor  # [rows, num_blocks] bool
    forced: torch.Tensor  # [rows, tokens, num_blocks] bool
    num_free: torch.Tensor  # [rows, tokens] int64
    sparse: bool  # some block may be left out


@dataclass(frozen=True)
class Plan:
    """One step's geometry, shared by all layers."""

    block_table: torch.Tensor  # [rows, max_pages] int64
    decode: "DecodeRows | None"
    prefill: list["PrefillRow"]
    num_targets: list[tuple[int, int]]  # (row, complete pages before this step) of rows that need their state


@dataclass(frozen=True)
class DecodeRows:
    """All rows of one query token."""

    tile: Tile
    table: PageTablePlan
    num_current: torch.Tensor  # [rows * kv_heads] int64, blocks of the current page
    slots: PaddedSlots | None  # None where top-p lets the lists' lengths depend on the layer


@dataclass(frozen=True)
class PrefillRow:
    """A row of several query tokens: a dense head, where everything fits into the budget, then tiles."""

    row: int
    first_token: int
    start: int  # position of the first query token
    dense_end: int  # positions below attend to everything
    tiles: list[Tile]
    pages: torch.Tensor  # [pages] int64, all pages of the row


class TorchPagedSpla:
    """Plan and run SPLA attention of one layer shape over the engine's paged cache.

    Args:
        params: What to compute.
        num_heads: Query heads `H`.
        num_kv_heads: Kv heads `G`.
        head_size: `d`.
        cache_dtype: Dtype of the cache; statistics are stored in it, states in float32.
        scale: Softmax scale; queries arrive unscaled.
        gain: Per-head weight of the tail, `[H]`; 1 where None.
        norm_weights: `(exact [H, d], tail [H, d])` of the double RMSNorm; 1 where None.
    """

    def __init__(
        self,
        params: SplaParameters,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype: torch.dtype,
        scale: float,
        gain: torch.Tensor | None = None,
        norm_weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.params = params
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.group = num_heads // num_kv_heads
        self.scale = scale
        self.gain = torch.ones(num_heads) if gain is None else gain.float()
        ones = torch.ones(num_heads, head_size)
        self.norm_weights = (ones, ones) if norm_weights is None else norm_weights
        self.selector = get_selector(params.selector)
        self.residual = make_residual(params, head_size)
        self.page_layout = PageLayout(
            params.page_size,
            head_size,
            cache_dtype.itemsize,
            params.selection_block,
            self.selector.width(head_size),
        )
        s_rows, z_size = (self.residual.s_rows, self.residual.z_size) if self.residual else (0, 0)
        self.state_layout = StateLayout(self.page_layout, s_rows, z_size)
        body = torch.arange(self.state_layout.body_rows)
        rows = self.state_layout.rows_per_block - 1
        self._body_block, self._body_row = body // rows, 1 + body % rows
        self._salt = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int64).to(torch.int32)
        self._counter = 0

    # Writing ----------------------------------------------------------------------------------------------------

    def update_cache(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Store keys and values; make statistics and stamp of every page whose last slot was written.

        Args:
            key: `[tokens, kv_heads, head_size]`.
            value: `[tokens, kv_heads, head_size]`.
            kv_cache: `[num_pages, kv_heads, page_size + statistics_rows, 2 * head_size]`.
            slot_mapping: `[tokens]` int64, `page * page_size + offset`, -1 for padding.
        """
        slots = slot_mapping[slot_mapping >= 0]
        if slots.numel() != slot_mapping.numel():
            key, value = key[slot_mapping >= 0], value[slot_mapping >= 0]
        page, offset = slots // self.params.page_size, slots % self.params.page_size
        kv_cache[page, :, offset] = torch.cat([key, value], -1).to(kv_cache.dtype)
        finished = page[offset == self.params.page_size - 1].unique()
        if finished.numel():
            self._write_statistics(kv_cache, finished)

    def _write_statistics(self, kv_cache: torch.Tensor, pages: torch.Tensor) -> None:
        params, layout, d = self.params, self.page_layout, self.head_size
        keys = kv_cache[pages, :, : params.page_size, :d].float()  # [pages, kv_heads, page_size, head_size]
        keys = keys.unflatten(2, (params.blocks_per_page, params.selection_block))
        limit = torch.finfo(kv_cache.dtype).max
        statistics = self.selector.statistics(keys).clamp(-limit, limit).to(kv_cache.dtype)
        area = torch.zeros(
            pages.numel(), self.num_kv_heads, layout.statistics_rows * 2 * d, dtype=kv_cache.dtype
        )  # [pages, kv_heads, elements]
        area[..., : layout.statistics_elements] = statistics.flatten(-2)
        self._counter += 1
        stamp = torch.empty(pages.numel(), STAMP_WORDS, dtype=torch.int32)
        stamp[:, :2], stamp[:, 2], stamp[:, 3] = self._salt, self._counter, pages
        area[..., layout.stamp_offset :] = stamp.view(kv_cache.dtype)[:, None]
        kv_cache[pages, :, params.page_size :] = area.unflatten(-1, (layout.statistics_rows, 2 * d))

    # Planning ---------------------------------------------------------------------------------------------------

    def plan(self, query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor) -> Plan:
        """What a step needs whatever the layer.

        Args:
            query_start_loc: `[rows + 1]` int, offsets of each row's query tokens.
            seq_lens: `[rows]` int, tokens of each row including this step's; 0 marks padding.
            block_table: `[rows, max_pages]` int, page ids.
        """
        starts, lens = query_start_loc.tolist(), seq_lens.tolist()
        query_lens = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        table = block_table.long()
        params = self.params
        budget_tokens = params.budget_blocks * params.selection_block
        decode_rows, prefill, targets = [], [], []
        for row, (query_len, seq_len) in enumerate(zip(query_lens, lens, strict=False)):
            if query_len == 0 or seq_len == 0:
                continue
            if query_len == 1:
                decode_rows.append(row)
            else:
                prefill.append(self._plan_prefill(row, starts[row], seq_len - query_len, seq_len, table))
            if seq_len > budget_tokens:
                targets.append((row, (seq_len - query_len) // params.page_size))
        decode = None
        if decode_rows:
            rows = torch.tensor(decode_rows)
            positions = seq_lens[rows].long()[:, None] - 1
            decode = self._plan_decode(rows, query_start_loc[rows].long()[:, None], positions, table)
        return Plan(table, decode, prefill, targets)

    def _plan_decode(
        self, rows: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
    ) -> DecodeRows:
        params, heads = self.params, self.num_kv_heads
        tile = self._tile(rows, tokens, positions, table)
        page_table = plan_page_table(table[rows], positions[:, 0], heads, params)
        blocks = positions[:, 0] // params.selection_block + 1
        num_current = (blocks - tile.num_pages * params.blocks_per_page).repeat_interleave(heads)
        slots = None
        if params.top_p is None:
            counts = blocks.clamp(max=params.budget_blocks).repeat_interleave(heads)
            indptr = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
            slots = pad_slots(indptr, page_table.last_page_len, num_current, params.selection_block)
        return DecodeRows(tile, page_table, num_current, slots)

    def _plan_prefill(self, row: int, first_token: int, start: int, end: int, table: torch.Tensor) -> PrefillRow:
        params = self.params
        page_size = params.page_size
        dense_end = max(start, min(end, params.budget_blocks * params.selection_block))
        tiles = []
        position = dense_end
        while position < end:
            stop = min(end, (position // page_size + 1) * page_size)
            positions = torch.arange(position, stop)[None]
            tiles.append(self._tile(torch.tensor([row]), positions - start + first_token, positions, table))
            position = stop
        return PrefillRow(row, first_token, start, dense_end, tiles, table[row, : -(-end // page_size)])

    def _tile(self, rows: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> Tile:
        params = self.params
        num_pages = positions[:, -1] // params.page_size  # [rows]
        width = int(num_pages.max())
        pages = table[rows, :width]
        pages = pages.masked_fill(torch.arange(width) >= num_pages[:, None], 0)
        num_complete = num_pages * params.blocks_per_page
        block = torch.arange(width * params.blocks_per_page)
        complete = block < num_complete[:, None]  # [rows, num_blocks]
        current = positions // params.selection_block  # [rows, tokens]
        forced = (block < params.first_blocks) | (block > current[..., None] - params.last_blocks)
        forced &= complete[:, None]
        in_current_page = current + 1 - num_complete[:, None]
        budget = torch.clamp(current + 1, max=params.budget_blocks)
        num_free = budget - in_current_page - forced.sum(-1)
        sparse = bool((current + 1 > params.budget_blocks).any())
        return Tile(rows, tokens, positions, pages, num_pages, complete, forced, num_free, sparse)

    # Running ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """`plan` and `run` in one."""
        self.run(self.plan(query_start_loc, seq_lens, block_table), query, kv_cache, state_cache, state_table, output)

    def run(
        self,
        plan: Plan,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        state_cache: torch.Tensor | None,
        state_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Attention of one layer.

        Args:
            plan: The step's plan.
            query: `[tokens, heads, head_size]`, unscaled.
            kv_cache: `[num_pages, kv_heads, rows, 2 * head_size]`, this step's tokens already in it.
            state_cache: As `kv_cache`, recurrent-state blocks; None without a residual.
            state_table: `[rows, >= K]` int, state blocks of each row.
            output: `[tokens, heads, head_size]`, written for every query token of the plan.
        """
        states = None
        if self.residual is not None and plan.num_targets:
            assert state_cache is not None and state_table is not None
            states = self._fold(plan, kv_cache, state_cache, state_table.long())
        if plan.decode is not None:
            self._decode(plan.decode, query, kv_cache, states, output)
        for row in plan.prefill:
            self._prefill(row, query, kv_cache, states, output)

    def _grouped(self, query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Scaled float32 queries `[rows, kv_heads, tokens * group, head_size]`."""
        q = query[tokens].float() * self.scale  # [rows, tokens, heads, head_size]
        q = q.unflatten(2, (self.num_kv_heads, self.group)).permute(0, 2, 1, 3, 4)
        return q.flatten(2, 3)

    def _statistics(self, kv_cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """`[rows, kv_heads, num_blocks, width]` float32 of `pages [rows, pages]`."""
        layout = self.page_layout
        used = -(-layout.statistics_elements // (2 * self.head_size))  # rows in use
        area = kv_cache[pages, :, layout.page_size : layout.page_size + used]  # [rows, pages, kv_heads, used, 2 d]
        area = area.flatten(-2)[..., : layout.statistics_elements].float()
        area = area.unflatten(-1, (layout.blocks_per_page, layout.statistics_width))
        return area.permute(0, 2, 1, 3, 4).flatten(2, 3)

    def _select(
        self, tile: Tile, q: torch.Tensor, kv_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Selected complete blocks `[rows, kv_heads, tokens, num_blocks]` and the log mass of the others
        `[rows, kv_heads, tokens * group]` (None where nothing asks for it)."""
        if tile.pages.shape[1] == 0:
            shape = (tile.rows.numel(), self.num_kv_heads, tile.tokens.shape[1], 0)
            return torch.zeros(shape, dtype=torch.bool), None
        statistics = self._statistics(kv_cache, tile.pages)
        scores = self.selector.score(q, statistics, self.params.selection_block)
        scores = scores.unflatten(2, (tile.tokens.shape[1], self.group))
        grouped = group_scores(scores, tile.complete)
        selected = select_blocks(grouped, tile.forced, tile.num_free, self.group, self.params.top_p)
        log_mass = None
        if self.residual is not None and self.params.combine == "shared_normalizer":
            mass = self.selector.mass(q, statistics, self.params.selection_block)
            mass = mass.unflatten(2, (tile.tokens.shape[1], self.group))
            rest = tile.complete[:, None, None] & ~selected
            log_mass = mass.masked_fill(~rest.unsqueeze(-2), -torch.inf).logsumexp(-1).flatten(2)
        return selected, log_mass

    def _decode(
        self,
        rows: DecodeRows,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor] | None,
        output: torch.Tensor,
    ) -> None:
        tile = rows.tile
        q = self._grouped(query, tile.tokens)  # [rows, kv_heads, group, head_size]
        selected, log_mass = self._select(tile, q, kv_cache)
        table = fill_page_table(rows.table, selected[:, :, 0])
        slots = rows.slots
        if slots is None:
            slots = pad_slots(table.indptr, table.last_page_len, rows.num_current, self.params.selection_block)
        kv = self._read_blocks(kv_cache, table.indices[slots.where].long())  # [requests, slots, block, 2 d]
        # Behind the last token, and in the place of a missing block, stands whatever the page held before.
        kv = kv.masked_fill_(~slots.visible[..., None], 0).flatten(1, 2).float()
        kv = kv.unflatten(0, (-1, self.num_kv_heads))
        keys, values = kv.split(self.head_size, -1)  # [rows, kv_heads, tokens, head_size]
        visible = slots.visible.flatten(1).unflatten(0, (-1, 1, self.num_kv_heads)).transpose(1, 2)
        exact, lse = masked_attention(q @ keys.mT, values, visible)  # visible: [rows, kv_heads, 1, tokens]
        reading, num_selected = None, None
        if states is not None and tile.sparse:
            assert self.residual is not None
            complete = slots.complete.unflatten(0, (-1, self.num_kv_heads))  # [rows, kv_heads, slots]
            mask = complete.repeat_interleave(self.params.selection_block, -1)[:, :, None]
            reading = self.residual.read_tokens(q, keys, values, mask)
            num_selected = complete.sum(-1, keepdim=True) * self.params.selection_block
        self._combine(tile, q, exact, lse, reading, num_selected, log_mass, states, output)

    def _read_blocks(self, kv_cache: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """`[..., selection_block, 2 * head_size]` of the page-table ids `[...]`."""
        params = self.params
        head = ids // params.blocks_per_page
        blocks = kv_cache[:, :, : params.page_size].unflatten(2, (params.blocks_per_page, params.selection_block))
        return blocks[head // self.num_kv_heads, head % self.num_kv_heads, ids % params.blocks_per_page]

    def _prefill(
        self,
        row: PrefillRow,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor] | None,
        output: torch.Tensor,
    ) -> None:
        if row.dense_end > row.start:
            self._dense(row, query, kv_cache, output)
        covered = None
        for tile in row.tiles:
            if states is not None:
                covered = self._advance(row, tile, covered, kv_cache, states)
            self._prefill_tile(tile, row, query, kv_cache, states, output)

    def _dense(
        self, row: PrefillRow, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Causal attention of the positions `start .. dense_end - 1`, whose every block fits into the budget."""
        pages = row.pages[: -(-row.dense_end // self.params.page_size)]
        kv = kv_cache[pages, :, : self.params.page_size].transpose(0, 1).flatten(1, 2)[:, : row.dense_end]
        keys, values = kv.split(self.head_size, -1)  # [kv_heads, tokens, head_size]
        tokens = slice(row.first_token, row.first_token + row.dense_end - row.start)
        q = query[tokens].transpose(0, 1).to(kv.dtype)  # [heads, queries, head_size]
        positions = torch.arange(row.start, row.dense_end)
        mask = None if row.start == 0 else torch.arange(row.dense_end) <= positions[:, None]
        out = F.scaled_dot_product_attention(
            q[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=True,
        )
        output[tokens] = out[0].transpose(0, 1).to(output.dtype)

    def _prefill_tile(
        self,
        tile: Tile,
        row: PrefillRow,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor] | None,
        output: torch.Tensor,
    ) -> None:
        params, per_page, heads = self.params, self.params.blocks_per_page, self.num_kv_heads
        q = self._grouped(query, tile.tokens)  # [1, kv_heads, tokens * group, head_size]
        selected, log_mass = self._select(tile, q, kv_cache)
        # Neighbouring tokens choose much the same blocks: gather the union once, mask per token.
        union = selected[0].any(1)  # [kv_heads, num_blocks]
        longest = int(union.sum(-1).max())
        slots = torch.sort(union.int(), dim=-1, descending=True, stable=True).indices[:, :longest]
        exists = union.gather(-1, slots)  # [kv_heads, slots]
        # A head with fewer blocks reads one of its own again instead of a block that nobody selected.
        slots = torch.where(exists, slots, slots[:, :1])
        head = torch.arange(heads)[:, None]
        ids = (tile.pages[0][slots // per_page] * heads + head) * per_page + slots % per_page
        kv = self._read_blocks(kv_cache, ids)  # [kv_heads, slots, block, 2 d]
        chosen = selected[0].gather(-1, slots[:, None].expand(-1, tile.tokens.shape[1], -1)) & exists[:, None]
        chosen = chosen.repeat_interleave(self.group, 1)  # [kv_heads, tokens * group, slots]

        end = int(tile.positions[0, -1]) % params.page_size + 1
        current = kv_cache[row.pages[int(tile.num_pages[0])], :, :end]  # [kv_heads, end, 2 d]
        causal = torch.arange(end) <= (tile.positions[0] % params.page_size)[:, None]
        causal = causal.repeat_interleave(self.group, 0).expand(heads, -1, -1)
        keys, values = torch.cat([kv.flatten(1, 2), current], 1).unsqueeze(1).split(self.head_size, -1)
        visible = torch.cat([chosen.repeat_interleave(params.selection_block, -1), causal], -1)
        # The kv heads are its batch, so that a group shares its keys. It is the one torch kernel with an LSE.
        exact, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[0].to(keys.dtype).unsqueeze(1),
            keys.contiguous(),
            values.contiguous(),
            attn_mask=torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, -torch.inf).unsqueeze(1),
            scale=1.0,
        )
        exact, lse = exact.float().transpose(0, 1), lse.transpose(0, 1)  # [1, kv_heads, tokens * group, ...]
        reading, num_selected = None, None
        if states is not None:
            assert self.residual is not None
            keys, values = kv.float()[None].split(self.head_size, -1)
            reading = self.residual.read_blocks(q, keys, values, chosen[None])
            num_selected = chosen[None].sum(-1) * params.selection_block
        self._combine(tile, q, exact, lse, reading, num_selected, log_mass, states, output)

    def _combine(
        self,
        tile: Tile,
        q: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        selected: Reading | None,
        num_selected: torch.Tensor | None,
        log_mass: torch.Tensor | None,
        states: tuple[torch.Tensor, torch.Tensor] | None,
        output: torch.Tensor,
    ) -> None:
        """Tail and combination of a tile.

        Args:
            tile: The tile.
            q: `[rows, kv_heads, tokens * group, head_size]`.
            out: Exact part, as `q`.
            lse: `[rows, kv_heads, tokens * group]`.
            selected: Reading of the selected blocks of complete pages; None where nothing is left out.
            num_selected: Tokens in those blocks, `[rows, kv_heads, 1 or tokens * group]`.
            log_mass: Log mass of the rest, as `lse`.
            states: `S` and `z` of all rows of the batch.
            output: `[tokens, heads, head_size]`.
        """
        params, tokens = self.params, tile.tokens.shape[1]
        tail = None
        if selected is not None:
            assert self.residual is not None and states is not None and num_selected is not None
            whole = self.residual.read(q, states[0][tile.rows], states[1][tile.rows].unsqueeze(-1))
            num_rest = (tile.num_pages * params.page_size)[:, None, None] - num_selected
            rest = tuple(a - b for a, b in zip(whole, selected, strict=True))
            tail = self.residual.tail(rest, num_rest.to(q.dtype))
            tail = tail.masked_fill((num_rest <= 0)[..., None], 0.0)
        if params.combine == "double_rmsnorm":
            w_exact, w_tail = (self._by_kv_head(w).repeat(1, tokens, 1) for w in self.norm_weights)
            tail = torch.zeros_like(out) if tail is None else tail
            out = double_rmsnorm(out, tail, w_exact, w_tail, params.rms_norm_eps)
        elif tail is not None:
            assert log_mass is not None
            out = shared_normalizer(out, lse, tail, log_mass + self._by_kv_head(self.gain).log().repeat(1, tokens))
        out = out.unflatten(2, (tokens, self.group)).permute(0, 2, 1, 3, 4).flatten(2, 3)
        output[tile.tokens] = out.to(output.dtype)

    def _by_kv_head(self, per_head: torch.Tensor) -> torch.Tensor:
        """`[heads, ...]` as `[kv_heads, group, ...]`."""
        return per_head.unflatten(0, (self.num_kv_heads, self.group))

    # Recurrent state --------------------------------------------------------------------------------------------

    def _state_rows(self, state_cache: torch.Tensor) -> torch.Tensor:
        """The state blocks as `[num_blocks, kv_heads, rows_per_block, head_size]` float32.

        `view` and nothing else: a copy would take every write to a state with it.
        """
        rows = state_cache.view(torch.float32)  # [num_blocks, kv_heads, rows, 2 d * itemsize / 4]
        return rows.view(*rows.shape[:2], self.state_layout.rows_per_block, self.head_size)

    def _stamp(self, kv_cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Stamps `[pages, kv_heads, 4]` int32."""
        words = STAMP_WORDS * 4 // kv_cache.element_size()
        return kv_cache[pages, :, -1, -words:].contiguous().view(torch.int32)

    def _fold(
        self, plan: Plan, kv_cache: torch.Tensor, state_cache: torch.Tensor, state_table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring the states of the plan's rows up to date (docs/design.md, 6).

        Returns:
            `S [batch rows, kv_heads, s_rows, head_size]` and `z [batch rows, kv_heads, z_size]` float32; zero for
            rows that have no complete page or need no state.
        """
        assert self.residual is not None
        layout = self.state_layout
        rows_view = self._state_rows(state_cache)
        shape = (plan.block_table.shape[0], self.num_kv_heads)
        all_s = torch.zeros(*shape, layout.s_rows, self.head_size)
        all_z = torch.zeros(*shape, layout.z_size)
        for row, target in plan.num_targets:
            if target == 0:
                continue
            blocks = state_table[row, : layout.num_blocks]
            pages = plan.block_table[row]
            covered = self._covered(rows_view, blocks, target, kv_cache, pages)
            if covered:
                all_s[row], all_z[row] = self._read_body(rows_view, blocks)
            if covered == target:
                continue
            for first in range(covered, target, _FOLD_PAGES):
                self._add_pages(all_s[row], all_z[row], kv_cache, pages[first : min(first + _FOLD_PAGES, target)])
            self._write_state(rows_view, blocks, target, self._stamp(kv_cache, pages[target - 1 : target])[0],
                              all_s[row], all_z[row])  # fmt: skip
        return all_s, all_z

    def _covered(
        self, rows_view: torch.Tensor, blocks: torch.Tensor, target: int, kv_cache: torch.Tensor, pages: torch.Tensor
    ) -> int:
        """Pages that the stored state covers for this very sequence; 0 where it cannot be trusted."""
        header = rows_view[blocks, :, 0, :STATE_HEADER_WORDS].contiguous().view(torch.int32)  # [K, kv_heads, 8]
        covered = int(header[0, 0, 1])
        if not 0 < covered <= target:
            return 0
        expected = torch.zeros_like(header)
        expected[..., 0], expected[..., 1] = STATE_MAGIC, covered
        expected[..., 2 : 2 + STAMP_WORDS] = self._stamp(kv_cache, pages[covered - 1 : covered])
        expected[..., 2 + STAMP_WORDS] = torch.arange(blocks.numel())[:, None]
        return covered if torch.equal(header, expected) else 0

    def _read_body(self, rows_view: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layout = self.state_layout
        body = rows_view[blocks[self._body_block], :, self._body_row].transpose(0, 1)  # [kv_heads, body_rows, d]
        s, z = body.split([layout.s_rows, layout.z_rows], 1)
        return s, z.flatten(1)[:, : layout.z_size]

    def _write_state(
        self,
        rows_view: torch.Tensor,
        blocks: torch.Tensor,
        covered: int,
        stamp: torch.Tensor,
        s: torch.Tensor,
        z: torch.Tensor,
    ) -> None:
        layout = self.state_layout
        z = F.pad(z, (0, layout.z_rows * self.head_size - layout.z_size)).unflatten(-1, (-1, self.head_size))
        rows_view[blocks[self._body_block], :, self._body_row] = torch.cat([s, z], 1).transpose(0, 1)
        header = torch.zeros(blocks.numel(), self.num_kv_heads, STATE_HEADER_WORDS, dtype=torch.int32)
        header[..., 0], header[..., 1], header[..., 2 : 2 + STAMP_WORDS] = STATE_MAGIC, covered, stamp
        header[..., 2 + STAMP_WORDS] = torch.arange(blocks.numel())[:, None]
        rows_view[blocks, :, 0, :STATE_HEADER_WORDS] = header.view(torch.float32)

    def _add_pages(self, s: torch.Tensor, z: torch.Tensor, kv_cache: torch.Tensor, pages: torch.Tensor) -> None:
        """Add whole pages to `s [kv_heads, s_rows, d]` and `z [kv_heads, z_size]` in place."""
        assert self.residual is not None
        kv = kv_cache[pages, :, : self.params.page_size].float().transpose(0, 1).flatten(1, 2)
        ds, dz = self.residual.contribution(*kv.split(self.head_size, -1))
        s += ds
        z += dz

    def _advance(
        self,
        row: PrefillRow,
        tile: Tile,
        covered: int | None,
        kv_cache: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor],
    ) -> int:
        """Add to a prefill row's state the pages that this very step completed, up to those of `tile`."""
        covered = row.start // self.params.page_size if covered is None else covered
        needed = int(tile.num_pages[0])
        if needed > covered:
            self._add_pages(states[0][row.row], states[1][row.row], kv_cache, row.pages[covered:needed])
        return needed
