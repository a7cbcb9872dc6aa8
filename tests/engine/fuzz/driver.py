"""A world's events, step by step, all of them functions of the world's seed: arrivals, aborts, resets, chunks."""

import random
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from .alone import Alone
from .settings import Settings
from .tokens import VOCABULARY
from .worker import Worker
from .world import World, WrongAnswer, quiet


@dataclass
class Failure:
    """Where a world went wrong."""

    kind: "type[Run]"
    seed: int
    steps: int  # with arrivals
    step: int
    message: str
    only: frozenset[int] | None  # requests that arrive, by number; None: all

    def __str__(self) -> str:
        only = "" if self.only is None else f" --only {' '.join(map(str, sorted(self.only)))}"
        again = f"python -m {self.kind.module} --seed {self.seed} --steps {self.steps}{only}"
        settings = self.kind.settings_of(self.seed)
        return f"seed {self.seed}, step {self.step}: {self.message}\n  {settings}\n  again: {again}"


@dataclass
class Run:
    """One world from its first step to the last request's end."""

    module: ClassVar[str] = "tests.engine.fuzz"  # what runs worlds of this kind
    report: ClassVar[str] = "fuzz"  # the kind of its report
    seed: int
    only: frozenset[int] | None = None  # requests that arrive, by number; None: all
    counts: Counter[str] = field(default_factory=Counter)
    step: int = 0

    def __post_init__(self) -> None:
        self.settings = self.settings_of(self.seed)
        with quiet():
            self.world = World(self.settings, self.seed)
        self.scheduler = self.world.scheduler
        self.worker = self._make_worker()
        self.alone = Alone(self.world, self.worker.vectors, self.counts)
        self.arrived = 0
        self.aborts: dict[str, int] = {}  # by request, the step of its abort
        self._in_flight: tuple[SchedulerOutput, ModelRunnerOutput] | None = None
        draw = random.Random(f"stems of {self.seed}")
        longest = self.settings.max_model_len
        self._stems = [[draw.randrange(VOCABULARY) for _ in range(longest)] for _ in range(3)]

    @staticmethod
    def settings_of(seed: int) -> Settings:
        return Settings.draw(seed)

    def _make_worker(self) -> Worker:
        return Worker(self.world, self.seed, self.counts)

    def steps(self, count: int) -> None:
        """Steps with arrivals, then steps until no request is left, and the count of blocks."""
        for _ in range(count):
            self._step(random.Random(f"{self.seed}, step {self.step}"), open_to_requests=True)
        self.drain()

    def drain(self) -> None:
        if random.Random(f"end of {self.seed}").random() < 0.5:
            self.aborts = dict.fromkeys(self.scheduler.requests, self.step)
        last = self.step + 20_000
        while self.scheduler.requests or self._in_flight:
            self._step(random.Random(f"{self.seed}, step {self.step}"), open_to_requests=False)
            if self.step > last:
                raise WrongAnswer(f"{len(self.scheduler.requests)} requests never end")
        # What finished in the last step is told with the next one.
        self.worker.finish(self.scheduler.finished_req_ids)
        self._check()
        leak = self.world.leaks()
        if leak:
            raise WrongAnswer(f"leak: {leak}")
        self.counts += self.world.poison.counts + self.world.heirs.counts
        self.counts["worlds"] += 1
        self.counts[f"worlds_with_states_of_{self.world.num_state_blocks}_blocks"] += 1

    def _step(self, draw: random.Random, open_to_requests: bool) -> None:
        settings, scheduler, counts = self.settings, self.scheduler, self.counts
        for _ in range(settings.live - len(scheduler.requests) if open_to_requests else 0):
            if draw.random() < settings.arrivals:
                self._arrive()
        self._abort([name for name, step in self.aborts.items() if step <= self.step])
        if draw.random() < settings.resets:
            running = draw.random() < 0.5
            counts["resets_of_running_requests" if running else "resets"] += 1
            with quiet():
                scheduler.reset_prefix_cache(reset_running_requests=running)
        # Chunks of odd sizes.
        limit = settings.max_num_batched_tokens
        scheduler.max_num_scheduled_tokens = limit if draw.random() < 0.5 else draw.randint(1, limit)
        # vLLM fails an assertion where this is less than a token and its drafts.
        longest = draw.choice((0, 0, 1 if settings.num_drafts == 0 else 0, 7, 16, 33, 63, 130))
        scheduler.scheduler_config.long_prefill_token_threshold = longest
        preempted = sum(r.num_preemptions for r in scheduler.requests.values())
        scheduled = scheduler.schedule()
        counts["preemptions"] += sum(r.num_preemptions for r in scheduler.requests.values()) - preempted
        counts["steps"] += 1
        ready: tuple[SchedulerOutput, ModelRunnerOutput] | None = None
        if scheduled.total_num_scheduled_tokens:
            ready = scheduled, self.worker.run(scheduled, self.step)
        else:
            counts["empty_steps"] += 1
            self.worker.finish(scheduled.finished_req_ids)
        if draw.random() < 0.1:  # while a step runs
            self._abort([name for name, step in self.aborts.items() if step <= self.step + 1])
        if settings.asynchronous:
            ready, self._in_flight = self._in_flight, ready
        if ready:
            scheduler.update_from_output(*ready)
        if settings.num_drafts and not settings.asynchronous:
            self._draft(draw)
        self._check()
        self.world.check_counts()
        self.step += 1

    def _arrive(self) -> None:
        index, self.arrived = self.arrived, self.arrived + 1
        if self.only is not None and index not in self.only:
            return
        settings, name = self.settings, f"request {index}"
        draw = random.Random(f"{self.seed}, {name}")
        longest = settings.max_model_len - 1
        prompt = self._prompt(draw, index)
        most = draw.choice((1, 5, 3 * settings.page_size, longest))
        sampling = SamplingParams(max_tokens=most, ignore_eos=True, temperature=0)
        request = Request(name, prompt, sampling, None, block_hasher=self.world.block_hasher)
        self.scheduler.add_request(request)
        self.counts["arrivals"] += 1
        if draw.random() < settings.aborts:
            self.aborts[name] = self.step + draw.randint(0, 60)
        if draw.random() < 0.3:  # an answer that is sent back, or a prompt of the same begin
            self._stems[draw.randrange(len(self._stems))] = [*prompt, *[draw.randrange(VOCABULARY)] * longest][:longest]

    def _cut(self, draw: random.Random) -> int:
        """A length to cut at, below that of the longest prompt: anywhere, or beside the end of a page."""
        longest, size = self.settings.max_model_len - 1, self.settings.page_size
        at_page = draw.randint(0, longest // size) * size + draw.choice((-1, 0, 1))
        return max(0, draw.choice((0, draw.randint(0, longest), at_page, at_page)))

    def _prompt(self, draw: random.Random, index: int) -> list[int]:
        """Of request number `index`: a stem, cut, and tokens of its own."""
        longest = self.settings.max_model_len - 1
        stem = draw.choice(self._stems)
        cut = self._cut(draw)
        own = min(draw.choice((1, 2, self.settings.page_size, draw.randint(1, longest))), longest)
        return [*stem[:cut], *[draw.randrange(VOCABULARY) for _ in range(own)]][:longest]

    def _abort(self, names: list[str]) -> None:
        for name in names:
            del self.aborts[name]
        self.counts["aborts"] += len(self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED))

    def _draft(self, draw: random.Random) -> None:
        names, drafts = [], []
        for request in self.scheduler.running:
            sequence = self.worker.sequences[request.request_id]
            names.append(request.request_id)
            drafts.append(sequence.draft(draw.randint(0, self.settings.num_drafts), self.step))
        self.scheduler.update_draft_token_ids(DraftTokenIds(names, drafts))

    def _check(self) -> None:
        draw = random.Random(f"{self.seed}, checks of step {self.step}")
        for computed in self.worker.unchecked:
            self.alone.check(computed, draw)
        self.worker.unchecked.clear()


@torch.inference_mode()  # as vLLM runs its models
def run(
    seed: int, steps: int, counts: Counter[str], only: frozenset[int] | None = None, kind: type[Run] = Run
) -> tuple[Run, Failure | None]:
    """A world of `steps` steps and those that its last requests need."""
    this = kind(seed, only, counts)
    try:
        this.steps(steps)
    except Exception as error:  # whatever breaks, in vLLM's scheduler or here
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno}: {where.line})"
        return this, Failure(kind, seed, min(steps, this.step + 1), this.step, message, only)
    return this, None


def shrink(failure: Failure) -> Failure:
    """A failure of the same world with as few requests as halving finds."""
    needed = failure.only
    if needed is None:
        needed = frozenset(range(run(failure.seed, failure.steps, Counter(), None, failure.kind)[0].arrived))
    size = len(needed)
    while size := size // 2:
        parts = sorted(needed)
        for start in range(0, len(parts), size):
            fewer = needed - frozenset(parts[start : start + size])
            _, smaller = run(failure.seed, failure.steps, Counter(), fewer, failure.kind)
            if smaller is not None:
                failure, needed = smaller, fewer
    return failure
