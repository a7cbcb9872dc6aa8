"""What a worker does of a step, with SPLA's own metadata builder and layers in the place of a model."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from .settings import NUM_HEADS
from .tokens import VOCABULARY, Hashes, Vectors
from .world import World


class WrongAnswer(AssertionError):
    """What a step computed is not what it should be."""


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
        self._width = -(-settings.max_model_len // settings.page_size)

    # The batch --------------------------------------------------------------------------------------------------

    def _update(self, scheduled: SchedulerOutput) -> dict[str, int]:
        """Take over what is new; returns where each row begins, as the scheduler has it."""
        begins = {}
        settings = self.world.settings
        self.finish(scheduled.finished_req_ids)
        for new in scheduled.scheduled_new_reqs:
            hashes = Hashes()
            hashes.extend(list(new.prompt_token_ids))
            shape = (settings.max_model_len, settings.num_layers, NUM_HEADS, settings.head_size)
            self.sequences[new.req_id] = Sequence(
                hashes,
                len(hashes),
                f"{self.seed}, {new.req_id}",
                tuple(list(ids) for ids in new.block_ids),
                torch.empty(shape, dtype=self.world.dtype),
                np.full(settings.max_model_len, -1),
                np.zeros(settings.max_model_len, bool),
            )
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
            rows.append((name, sequence, start, end, known, begins[name] + count))
        outputs = self._attend(rows, scheduled)
        sampled = self._sample(rows, outputs, step)
        return ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)

    def _attend(self, rows: list[tuple[Any, ...]], scheduled: SchedulerOutput) -> torch.Tensor:
        """`[tokens, layers, H, d]`."""
        world, size = self.world, self.world.settings.page_size
        lens = np.array([end - start for _, _, start, end, *_ in rows])
        tables = [np.zeros((len(rows), self._width), np.int32) for _ in world.groups]
        slots, hashes = [], []
        for i, (_, sequence, start, end, *_) in enumerate(rows):
            for group, ids in enumerate(sequence.blocks):
                tables[group][i, : len(ids)] = ids
            positions = np.arange(start, end)
            slots.append(tables[world.of_pages][i, positions // size].astype(np.int64) * size + positions % size)
            hashes.append(sequence.hashes[start:end])
        self._check_ownership(rows, tables, slots)
        padding = int(scheduled.total_num_scheduled_tokens) % 3 == 0  # rows of none, as behind a CUDA graph's
        starts = torch.tensor([0, *lens.cumsum(), *[lens.sum()] * padding], dtype=torch.int32)
        tables = [np.concatenate([table, np.zeros((int(padding), self._width), np.int32)]) for table in tables]
        none = [0] * padding
        prompts = [start < sequence.num_prompt for _, sequence, start, *_ in rows]
        slot_mapping = torch.from_numpy(np.concatenate(slots))
        metadata = {}
        for group, (layer_names, builder) in enumerate(world.groups):
            common = CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=torch.tensor([*[row[3] for row in rows], *none], dtype=torch.int32),
                num_reqs=len(rows) + padding,
                num_actual_tokens=int(lens.sum()),
                max_query_len=int(lens.max()),
                max_seq_len=max(row[5] for row in rows),
                block_table_tensor=torch.from_numpy(tables[group]),
                slot_mapping=slot_mapping,
                is_prefilling=torch.tensor([*prompts, *[False] * padding]),
                seq_lens_cpu_upper_bound=torch.tensor([*[row[5] for row in rows], *none], dtype=torch.int32),
            )
            built = builder.build(0, common)
            metadata.update(dict.fromkeys(layer_names, built))
        together = np.concatenate(hashes)
        outputs = []
        with set_forward_context(metadata, world.config):
            for index, layer in enumerate(world.layers):
                query, key, value = self.vectors.of(together, index)
                out = torch.full(query.shape, torch.nan, dtype=query.dtype)
                layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slot_mapping)
                layer.impl.forward(layer, query, key, value, layer.kv_cache, metadata[layer.layer_name], out)
                outputs.append(out)
        return torch.stack(outputs, 1)

    def _check_ownership(self, rows: list[Any], tables: list[np.ndarray], slots: list[np.ndarray]) -> None:
        """Nobody else holds what a row writes: pages of its new tokens, and its state."""
        world = self.world
        blocks = world.scheduler.kv_cache_manager.block_pool.blocks
        written = [set((s // world.settings.page_size).tolist()) for s in slots]
        for i, mine in enumerate(written):
            if world.of_states is not None:
                state = tables[world.of_states][i, : world.num_state_blocks].tolist()
                if len(set(state)) < world.num_state_blocks or mine & set(state):
                    raise WrongAnswer(f"{rows[i][0]} has the state blocks {state} and writes to pages {mine}")
                if any(blocks[b].ref_cnt != 1 for b in state):
                    raise WrongAnswer(f"{rows[i][0]} does not hold its state blocks {state} alone")
                mine |= set(state)
            if any(b == 0 or blocks[b].ref_cnt == 0 for b in mine):
                raise WrongAnswer(f"{rows[i][0]} writes to blocks {mine}, which it does not hold")
            # vLLM lets a request find pages that another one of the same step is about to fill.
            self.counts["pages_found_while_written"] += sum(blocks[b].ref_cnt > 1 for b in mine)
            if any(mine & other for other in written[:i]):
                raise WrongAnswer(f"{rows[i][0]} writes where another row of the step does")

    # What follows -----------------------------------------------------------------------------------------------

    def _sample(self, rows: list[Any], outputs: torch.Tensor, step: int) -> list[list[int]]:
        counts, sampled, first = self.counts, [], 0
        threshold = 1 + self.world.settings.num_drafts
        limit = self.world.settings.max_model_len
        behind_prompt = False
        for name, sequence, start, end, known, _ in rows:
            out = outputs[first : first + end - start]
            first += end - start
            if not bool(out.isfinite().all()):
                bad = (~out.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
                raise WrongAnswer(f"{name}: outputs of positions {[start + i for i in bad]} are not finite")
            behind_prompt |= end - start > threshold
            counts["tokens"] += end - start
            counts["prefill_rows" if end - start > threshold else "decode_rows"] += 1
            drafts = sequence.hashes.tokens[known:]
            accepted = 0
            while accepted < len(drafts) and drafts[accepted] == sequence.token(known + accepted):
                accepted += 1
            stop = min(end, known + accepted)
            as_prompt = behind_prompt and end - start > 1  # alone, a token is a decode row wherever it stands
            if stop < end:
                self.unchecked.append(
                    Computed(
                        f"drafts of {name}",
                        sequence.hashes.tokens[:end],
                        np.arange(stop, end),
                        out[stop - start :],
                        np.full(end - stop, step),
                        np.full(end - stop, as_prompt),
                    )
                )
            counts["drafts"] += len(drafts)
            counts["rejected_drafts"] += len(drafts) - accepted
            counts["verification_rows"] += bool(drafts)
            sequence.hashes.cut(known + accepted)
            if bool((sequence.steps[start:stop] >= 0).any()):
                raise WrongAnswer(f"{name}: positions of {start} to {stop} are computed again")
            sequence.outputs[start:stop] = out[: stop - start]
            sequence.steps[start:stop] = step
            sequence.as_prompt[start:stop] = as_prompt
            if end < known:  # a chunk of a prompt
                counts["chunks"] += 1
                sampled.append([])
                continue
            new = [*drafts[:accepted], sequence.token(known + accepted)]
            sequence.hashes.extend(new[-1:])
            if len(sequence.hashes) > limit:
                sequence.hashes.cut(limit)
            sampled.append(new)
        return sampled
