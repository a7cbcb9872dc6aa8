"""What a worker does of a step, with SPLA's own metadata builder and layers in the place of a model."""

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from .settings import NUM_HEADS
from .tokens import VOCABULARY, Hashes, Vectors
from .world import World, WrongAnswer


@dataclass
class Sequence:
    """A request, as the worker knows it."""

    hashes: Hashes
    num_prompt: int
    draw_seed: str
    blocks: tuple[list[int], ...]
    outputs: torch.Tensor  # [max_model_len, layers, H, d], of positions that were computed
    steps: np.ndarray  # [max_model_len], of the step that computed a position; -1: none did
    as_prompt: np.ndarray  # [max_model_len] bool, whether it did so in a prefill row

    def token(self, position: int) -> int:
        """What is sampled for a position: the same, whenever it is."""
        return random.Random(f"{self.draw_seed}, token {position}").randrange(VOCABULARY)

    def draft(self, count: int, step: int) -> list[int]:
        """Drafts of the tokens behind the last: each is right more often than not."""
        draw = random.Random(f"{self.draw_seed}, drafts of step {step}")
        start = len(self.hashes)
        right = draw.random()
        return [self.token(start + i) if draw.random() < right else draw.randrange(VOCABULARY) for i in range(count)]


@dataclass
class Row:
    """What a step computes of a request: positions `start .. end - 1`."""

    name: str
    sequence: Sequence
    start: int
    end: int
    known: int  # tokens that are known; those behind them are drafts
    bound: int  # what the scheduler takes for the end: with asynchronous scheduling, as if no draft were ever rejected

    def __len__(self) -> int:
        return self.end - self.start


@dataclass
class Computed:
    """What steps computed of a sequence, to be checked."""

    name: str
    tokens: list[int]
    positions: np.ndarray  # [n], in ascending order
    outputs: torch.Tensor  # [n, layers, H, d]
    steps: np.ndarray  # [n]
    as_prompt: np.ndarray  # [n] bool


class Worker:
    """Rows of a batch, their vectors, their attention, and the tokens that follow."""

    def __init__(self, world: World, seed: int, counts: Counter[str]) -> None:
        settings = world.settings
        self.world, self.seed, self.counts = world, seed, counts
        self.vectors = Vectors(seed, settings.head_size, world.dtype)
        self.sequences: dict[str, Sequence] = {}
        self.unchecked: list[Computed] = []
        self._width = max(-(-settings.max_model_len // settings.page_size), world.num_state_blocks)

    # The batch --------------------------------------------------------------------------------------------------

    def _update(self, scheduled: SchedulerOutput) -> dict[str, int]:
        """Take over what is new; returns where each row begins, as the scheduler has it."""
        begins = {}
        self.finish(scheduled.finished_req_ids)
        for new in scheduled.scheduled_new_reqs:
            blocks = tuple(list(ids) for ids in new.block_ids)
            self.sequences[new.req_id] = self._sequence(new.req_id, list(new.prompt_token_ids), blocks)
            begins[new.req_id] = new.num_computed_tokens
            self.counts["prefix_hits"] += new.num_computed_tokens > 0
        old = scheduled.scheduled_cached_reqs
        for name, ids, computed in zip(old.req_ids, old.new_block_ids, old.num_computed_tokens, strict=True):
            sequence = self.sequences[name]
            if name in old.resumed_req_ids:
                self._hand_over(name)
                sequence.steps[:] = -1
                sequence.blocks = tuple(list(i) for i in ids)
                self.counts["resumptions"] += 1
                self.counts["resumptions_with_prefix_hits"] += computed > 0
            elif ids is not None:
                for held, more in zip(sequence.blocks, ids, strict=True):
                    held += more
            if name in old.all_token_ids:  # not in the step before: what it sampled may have been dropped
                known = old.all_token_ids[name]
                if known != sequence.hashes.tokens[: len(known)]:
                    raise WrongAnswer(f"{name} has other tokens than the scheduler says")
                sequence.hashes.cut(len(known))
            begins[name] = computed
        return begins

    def _sequence(self, name: str, prompt: list[int], blocks: tuple[list[int], ...]) -> Sequence:
        settings = self.world.settings
        hashes = Hashes()
        hashes.extend(prompt)
        shape = (settings.max_model_len, settings.num_layers, NUM_HEADS, settings.head_size)
        return Sequence(
            hashes,
            len(hashes),
            f"{self.seed}, {name}",
            blocks,
            torch.empty(shape, dtype=self.world.dtype),
            np.full(settings.max_model_len, -1),
            np.zeros(settings.max_model_len, bool),
        )

    def finish(self, names: set[str]) -> None:
        """Requests that ended or were aborted."""
        for name in names & self.sequences.keys():  # others were never scheduled
            self._hand_over(name)
            del self.sequences[name]

    def _region(self, name: str, begin: int, count: int) -> int:
        """Where vLLM puts a row of the batch: `reorder_batch_to_split_decodes_and_prefills`."""
        if begin == 0:
            return 3
        if count > 1 + self.world.settings.num_drafts:
            return 2
        return int(begin < self.sequences[name].num_prompt)

    def _hand_over(self, name: str) -> None:
        """Let a sequence's outputs be checked."""
        sequence = self.sequences[name]
        positions = np.flatnonzero(sequence.steps >= 0)
        if len(positions):
            self.unchecked.append(
                Computed(
                    name,
                    sequence.hashes.tokens[: positions[-1] + 1],
                    positions,
                    sequence.outputs[torch.from_numpy(positions)],
                    sequence.steps[positions],
                    sequence.as_prompt[positions],
                )
            )

    def run(self, scheduled: SchedulerOutput, step: int) -> ModelRunnerOutput:
        """A step: attention of all layers, and what is sampled."""
        begins = self._update(scheduled)
        names = sorted(begins, key=lambda name: self._region(name, begins[name], scheduled.num_scheduled_tokens[name]))
        rows = []
        for name in names:
            sequence, count = self.sequences[name], scheduled.num_scheduled_tokens[name]
            known = len(sequence.hashes)
            drafts = scheduled.scheduled_spec_decode_tokens.get(name, [])
            # With asynchronous scheduling all drafts of the step before count as accepted, and the new ones are not
            # known: the worker knows better.
            start = min(begins[name], known - 1)
            if drafts and drafts[0] < 0:
                drafts = sequence.draft(len(drafts), step)
            sequence.hashes.extend(drafts)
            end = start + count
            if end > len(sequence.hashes) or (drafts and end != len(sequence.hashes)):
                raise WrongAnswer(f"{name} has {len(sequence.hashes)} tokens, and {start} to {end} are scheduled")
            rows.append(Row(name, sequence, start, end, known, begins[name] + count))
        outputs = self._attend(rows)
        sampled = self._sample(rows, outputs, step)
        return ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)

    def _attend(self, rows: list[Row]) -> torch.Tensor:
        """`[tokens, layers, H, d]`."""
        world, size = self.world, self.world.settings.page_size
        num_tokens = sum(map(len, rows))
        padding = int(num_tokens % 3 == 0)  # rows of none, as behind those of a CUDA graph
        tables = [np.zeros((len(rows) + padding, self._width), np.int32) for _ in world.groups]
        slots = []
        for i, row in enumerate(rows):
            for group, ids in enumerate(row.sequence.blocks):
                tables[group][i, : len(ids)] = ids
            page, offset = np.divmod(np.arange(row.start, row.end), size)
            slots.append(tables[world.of_pages][i, page].astype(np.int64) * size + offset)
        self._check_ownership(rows, tables, slots)
        slot_mapping = torch.from_numpy(np.concatenate(slots))
        none = [0] * padding
        starts = torch.tensor([0, *map(len, rows), *none]).cumsum(0).int()
        metadata = {}
        for (layer_names, builder), table in zip(world.groups, tables, strict=True):
            common = CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=torch.tensor([*[row.end for row in rows], *none], dtype=torch.int32),
                num_reqs=len(rows) + padding,
                num_actual_tokens=num_tokens,
                max_query_len=max(map(len, rows)),
                max_seq_len=max(row.bound for row in rows),
                block_table_tensor=torch.from_numpy(table),
                slot_mapping=slot_mapping,
                is_prefilling=torch.tensor([*[row.start < row.sequence.num_prompt for row in rows], *none]).bool(),
                seq_lens_cpu_upper_bound=torch.tensor([*[row.bound for row in rows], *none], dtype=torch.int32),
            )
            metadata.update(dict.fromkeys(layer_names, builder.build(0, common)))
        outputs = []
        with set_forward_context(metadata, world.config):
            for index, layer in enumerate(world.layers):
                query, key, value = self._vectors_of(rows, index)
                out = torch.full(query.shape, torch.nan, dtype=query.dtype)
                layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slot_mapping)
                layer.impl.forward(layer, query, key, value, layer.kv_cache, metadata[layer.layer_name], out)
                outputs.append(out)
        return torch.stack(outputs, 1)

    def _vectors_of(self, rows: list[Row], layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[tokens, H, d]`, keys and values `[tokens, G, d]` of a step."""
        return self.vectors.of(np.concatenate([row.sequence.hashes[row.start : row.end] for row in rows]), layer)

    def _check_ownership(self, rows: list[Row], tables: list[np.ndarray], slots: list[np.ndarray]) -> None:
        """Nobody else holds what a row writes: pages of its new tokens, and its state."""
        world = self.world
        blocks = world.scheduler.kv_cache_manager.block_pool.blocks
        written = [set((s // world.settings.page_size).tolist()) for s in slots]
        for i, mine in enumerate(written):
            if world.of_states is not None:
                state = tables[world.of_states][i, : world.num_state_blocks].tolist()
                if len(set(state)) < world.num_state_blocks or mine & set(state):
                    raise WrongAnswer(f"{rows[i].name} has the state blocks {state} and writes to pages {mine}")
                if any(blocks[b].ref_cnt != 1 for b in state):
                    raise WrongAnswer(f"{rows[i].name} does not hold its state blocks {state} alone")
                mine |= set(state)
            if any(b == 0 or blocks[b].ref_cnt == 0 for b in mine):
                raise WrongAnswer(f"{rows[i].name} writes to blocks {mine}, which it does not hold")
            # vLLM lets a request find pages that another one of the same step is about to fill.
            self.counts["pages_found_while_written"] += sum(blocks[b].ref_cnt > 1 for b in mine)
            if any(mine & other for other in written[:i]):
                raise WrongAnswer(f"{rows[i].name} writes where another row of the step does")

    # What follows -----------------------------------------------------------------------------------------------

    def _sample(self, rows: list[Row], outputs: torch.Tensor, step: int) -> list[list[int]]:
        """What follows each row, if it is not a chunk; drafts are accepted up to the first that is not what is sampled.
        What was computed is kept to be checked."""
        sampled = []
        behind_prompt = False
        finite = outputs.isfinite().flatten(1).all(1).numpy()  # [tokens]
        where = np.cumsum([0, *map(len, rows)])
        for row, first, out in zip(rows, where, outputs.split([len(row) for row in rows]), strict=False):
            if not finite[first : first + len(row)].all():
                bad = (row.start + np.flatnonzero(~finite[first : first + len(row)])).tolist()
                raise WrongAnswer(f"{row.name}: outputs of positions {bad} are not finite")
            is_long = len(row) > 1 + self.world.settings.num_drafts
            behind_prompt |= is_long
            as_prompt = behind_prompt and len(row) > 1  # one token is a decode row wherever it stands
            sequence = row.sequence
            drafts = sequence.hashes.tokens[row.known :]
            accepted = 0
            while accepted < len(drafts) and drafts[accepted] == sequence.token(row.known + accepted):
                accepted += 1
            self._keep(row, min(row.end, row.known + accepted), out, step, as_prompt)
            sequence.hashes.cut(row.known + accepted)
            if row.end < row.known:
                sampled.append([])
            else:
                sampled.append([*drafts[:accepted], sequence.token(row.known + accepted)])
                if len(sequence.hashes) < self.world.settings.max_model_len:
                    sequence.hashes.extend(sampled[-1][-1:])
            self.counts["tokens"] += len(row)
            self.counts["prefill_rows" if is_long else "decode_rows"] += 1
            self.counts["chunks"] += row.end < row.known
            self.counts["verification_rows"] += bool(drafts)
            self.counts["drafts"] += len(drafts)
            self.counts["rejected_drafts"] += len(drafts) - accepted
        return sampled

    def _keep(self, row: Row, stop: int, out: torch.Tensor, step: int, as_prompt: bool) -> None:
        """Outputs up to `stop` with the sequence; those of drafts that were rejected by themselves."""
        sequence, num_kept, num_rejected = row.sequence, stop - row.start, row.end - stop
        if num_rejected:
            self.unchecked.append(
                Computed(
                    f"drafts of {row.name}",
                    sequence.hashes.tokens[: row.end],
                    np.arange(stop, row.end),
                    out[num_kept:],
                    np.full(num_rejected, step),
                    np.full(num_rejected, as_prompt),
                )
            )
        kept = slice(row.start, stop)
        if (sequence.steps[kept] >= 0).any():
            raise WrongAnswer(f"{row.name}: positions of {row.start} to {stop} are computed twice")
        sequence.outputs[kept], sequence.steps[kept], sequence.as_prompt[kept] = out[:num_kept], step, as_prompt
