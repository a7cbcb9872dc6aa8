"""Run worlds until a number of steps or minutes is over, print what went wrong and write a report."""

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from tqdm import tqdm

from spla_backend.evaluate import report

from .driver import Run, run, shrink


def _arguments(kind: type[Run]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {kind.module}", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first world; the next has the next number")
    parser.add_argument("--steps", type=int, default=10**6, help="in all worlds together")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="when to begin no further world")
    parser.add_argument("--world-steps", type=int, default=300, help="of a world, before the last requests end")
    parser.add_argument("--only", type=int, nargs="+", help="requests that arrive, by number")
    parser.add_argument("--failures", type=int, default=1, help="end after so many worlds that went wrong")
    parser.add_argument("--output", type=Path, help="where to write a report in JSON")
    return parser.parse_args()


def main(kind: type[Run]) -> int:
    """Worlds of `kind`, as the command line says; returns the exit status."""
    arguments = _arguments(kind)
    counts: Counter[str] = Counter()
    by_options: dict[str, Counter[str]] = defaultdict(Counter)
    worst: Counter[str] = Counter()
    failures: list[str] = []
    only = None if arguments.only is None else frozenset(arguments.only)
    begin, begin_cpu, seed = time.monotonic(), time.process_time(), arguments.seed
    # Ctrl-C ends it, too, and there is a report of the worlds before.
    with tqdm(total=arguments.steps, unit="step") as bar, contextlib.suppress(KeyboardInterrupt):
        while counts["steps"] < arguments.steps and time.monotonic() - begin < 60 * arguments.minutes:
            of_world: Counter[str] = Counter()
            steps = min(arguments.world_steps, arguments.steps - counts["steps"])
            world, failure = run(seed, steps, of_world, only, kind)
            if failure is not None:
                bar.write(f"{failure}\n  looking for fewer requests that do the same")
                failures.append(str(shrink(failure)))
                bar.write(failures[-1])
            for what, error in world.alone.worst.items():
                key = f"{what}, {world.settings.dtype}"
                worst[key] = max(worst[key], error)
            counts += of_world
            for name in world.settings.groups():
                by_options[name].update({k: of_world[k] for k in ("worlds", "steps", "tokens")})
            bar.update(of_world["steps"])
            bar.set_postfix(worlds=counts["worlds"], wrong=len(failures))
            seed += 1
            if len(failures) >= arguments.failures:
                break
    minutes = (time.monotonic() - begin) / 60
    leaks = sum("leak:" in failure for failure in failures)
    result = {
        "kind": kind.report,
        "command": f"python -m {kind.module} {shlex.join(sys.argv[1:])}",
        "versions": report.versions(),
        "hardware": report.hardware(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
        "seeds": [arguments.seed, seed - 1],
        "minutes": round(minutes, 1),
        "cpu_minutes": round((time.process_time() - begin_cpu) / 60, 1),  # where others have the cores, too, less
        "steps_per_minute": round(counts["steps"] / minutes),
        "mismatches": len(failures) - leaks,
        "leaks": leaks,
        "failures": failures,
        "counts": dict(sorted(counts.items())),
        "largest_relative_error": dict(sorted(worst.items())),
        "by_options": {name: dict(of) for name, of in sorted(by_options.items())},
    }
    if arguments.output:
        report.write(result, arguments.output)
    for name in ("steps", "minutes", "steps_per_minute", "mismatches", "leaks"):
        print(f"{name}: {result['counts']['steps'] if name == 'steps' else result[name]}")
    return int(bool(failures))
