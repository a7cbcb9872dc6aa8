"""What users feel: many long requests through vLLM, dense and SPLA, each with the machine to itself.

    python benchmarks/serving.py --only 24x32K 5x128K document --output benchmarks/results/serving_h200.json
    python benchmarks/serving.py --only 24x32K-http 5x128K-http document-http \
        --merge benchmarks/results/serving_h200.json --output benchmarks/results/serving_h200.json

Scenarios: `24x32K` and `5x128K` are prompts of that length, all sent at once; `document` is 16 questions on one
document of 100K tokens that the engine has in its prefix cache. `24x32K-http`, `5x128K-http` and `document-http` are
the same, sent by `vllm bench serve` to one `vllm serve`. Each request is answered with 256 tokens, greedy, no early
stop.

Protocol: the shape of Llama-3.1-8B, normal weights that are the same for every engine, prompts of random tokens. One
engine after the other, with the same arguments but for the backend: as much memory, room for 128K tokens, and what vLLM
does unless told otherwise (chunked prefill, prefix caching, CUDA graphs). Over HTTP prompts are text, and the server's
chunks are smaller than those of `LLM` (8192 and 16384 tokens on an H200). Before each scenario a few requests of its
kind warm up, with prompts that are not sent again but for the document.

Rows are `{backend, scenario, requests, prompt, output, wall_s, out_tok_s, ttft_median_s, ttft_max_s, tpot_ms, ...}`.
Times are the engine's statistics of each request, over HTTP the client's. A request's time to the first token counts
from when it is sent, so that it includes its wait for others. Its time per output token is that between its first and
its last token, divided by the tokens between them, and includes the prompts that are computed meanwhile: `tpot_ms` is
the median, `tpot_last_ms` that of the request which began last, when there were only answers. `preemptions` counts how
often a request had to be computed again for want of memory, `cached` the tokens of a prompt that were in the prefix
cache (the median, over HTTP the mean).

`--small` runs the same on a tiny model with short prompts, to see that it runs.
"""

import argparse
import contextlib
import gc
import json
import os
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine import LLAMA_8B, draw_weights

from spla_backend.evaluate import report

HERE = Path(__file__).resolve().parent
VLLM = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]  # -P: what is installed, not this checkout
BACKENDS = ("dense", "spla")


@dataclass(frozen=True)
class Scenario:
    """Requests that are sent at once.

    Attributes:
        requests: How many.
        prompt: Tokens of each prompt.
        output: Tokens of each answer.
        document: The first tokens of all prompts, which are the same and cached.
        http: Whether through a server.
        expected_s: About how long it takes, by backend, on an H200.
    """

    requests: int
    prompt: int
    output: int
    document: int = 0
    http: bool = False
    expected_s: dict[str, float] = field(default_factory=dict)

    def prompts(self, number: int, seed: int, vocab_size: int) -> list[list[int]]:
        """Random tokens: others with another seed and in another scenario. The document does not depend on the seed."""
        import numpy as np

        def draw(seed: int, shape: tuple[int, ...]) -> Any:
            return np.random.default_rng([self.prompt, seed]).integers(10, vocab_size, shape)

        document = draw(0, (self.document,)).tolist()
        return [document + tail for tail in draw(seed, (number, self.prompt - self.document)).tolist()]


@dataclass(frozen=True)
class Setup:
    """A model and what it is asked."""

    name: str
    config: dict[str, Any]  # config.json
    engine_args: dict[str, Any]
    options: dict[str, Any]  # of SPLA
    scenarios: dict[str, Scenario]


LARGE = Setup(
    "shape of Llama-3.1-8B, random weights",
    LLAMA_8B,
    {"gpu_memory_utilization": 0.92},
    {},
    {
        "24x32K": Scenario(24, 32768, 256, expected_s={"dense": 37, "spla": 28}),
        "5x128K": Scenario(5, 131072 - 256, 256, expected_s={"dense": 60, "spla": 26}),
        "document": Scenario(16, 102400 + 64, 256, document=102400, expected_s={"dense": 10, "spla": 3}),
        "24x32K-http": Scenario(24, 32768, 256, http=True, expected_s={"dense": 37, "spla": 28}),
        "5x128K-http": Scenario(5, 131072 - 256, 256, http=True, expected_s={"dense": 60, "spla": 26}),
        "document-http": Scenario(
            16, 102400 + 64, 256, document=102400, http=True, expected_s={"dense": 12, "spla": 5}
        ),
    },
)
SMALL = Setup(
    "tiny Llama, random weights",
    LLAMA_8B
    | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "head_dim": 64, "vocab_size": 1000, "torch_dtype": "float32"},
    {"gpu_memory_utilization": 0.3, "block_size": 32, "enforce_eager": True},
    {"budget": 128},
    {
        "4x300": Scenario(4, 300, 16),
        "2x600": Scenario(2, 600, 16),
        "document": Scenario(3, 512 + 20, 16, document=512),
        "4x300-http": Scenario(4, 300, 16, http=True),
        "document-http": Scenario(3, 512 + 20, 16, document=512, http=True),
    },
)


class RandomWeights:
    """Added to vLLM's workers (`worker_extension_cls`)."""

    def draw_weights(self) -> None:
        """Normal weights, the same in every engine, in place of vLLM's dummy ones, which make all pages weigh alike."""
        import torch

        torch.manual_seed(0)
        draw_weights(self.get_model())  # type: ignore[attr-defined]


def make_model(folder: Path, config: dict[str, Any]) -> str:
    """A model folder without weights. Its tokenizer writes token 17 as "17", so that any text of numbers has as many
    tokens as numbers, and needs no files from elsewhere. The space before a number is part of its token, because the
    server refuses a text that is longer than as many of the longest token as the model takes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"▁{i}": i for i in range(config["vocab_size"])}))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return str(folder)


def in_process(llm: Any, scenario: Scenario) -> dict[str, Any]:
    from vllm import SamplingParams

    def answers(prompts: list[list[int]], tokens: int) -> list[Any]:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return llm.generate([{"prompt_token_ids": p} for p in prompts], sampling)

    vocab_size = llm.model_config.get_vocab_size()
    first, *others = scenario.prompts(3, 1, vocab_size)
    if scenario.document:
        answers([first], 16)
        answers(others, 16)
    else:
        answers([others[0][: scenario.prompt // 8], first], 16)
    prompts = scenario.prompts(scenario.requests, 2, vocab_size)
    begin = time.perf_counter()
    outputs = answers(prompts, scenario.output)
    wall_s = time.perf_counter() - begin
    metrics = [o.metrics for o in outputs]
    tpots = [(m.last_token_ts - m.first_token_ts) / (scenario.output - 1) for m in metrics]
    last = max(range(len(metrics)), key=lambda i: metrics[i].first_token_ts)
    return summary(scenario, wall_s, [m.first_token_latency for m in metrics], tpots, last) | {
        "preemptions": sum(m.num_preemptions for m in metrics),
        "cached": statistics.median(o.num_cached_tokens or 0 for o in outputs),
    }


def over_http(url: str, model: str, scenario: Scenario) -> dict[str, Any]:
    """As `in_process`, by `vllm bench serve`.

    Raises:
        RuntimeError: The client ended with an error, not every request was answered as asked, or the prefix cache held
            something else than the document.
    """
    seed = scenario.prompt
    if scenario.document:
        # The client draws the document after the first token of each question: it is the same only if the seed and the
        # number of requests are. One token of a question fills no block, so that no question is cached.
        client(url, model, replace(scenario, prompt=scenario.document + 1, output=16), seed)
    else:
        client(url, model, replace(scenario, requests=2, prompt=min(scenario.prompt, 32768), output=16), seed + 1)
    before = counted(url)
    result = client(url, model, scenario, seed)
    preemptions, hits = (after - number for after, number in zip(counted(url), before, strict=True))
    cached = hits / scenario.requests
    if not 0.9 * scenario.document <= cached <= scenario.document:
        raise RuntimeError(
            f"{cached} tokens of a prompt were in the prefix cache instead of {scenario.document}, the times are of"
            " something else: does this version of `vllm bench serve` draw or send prompts in another way?"
        )
    tpots = [sum(itls) / (scenario.output - 1) for itls in result["itls"]]
    last = max(range(len(tpots)), key=lambda i: result["start_times"][i] + result["ttfts"][i])
    row = summary(scenario, result["duration"], result["ttfts"], tpots, last)
    return row | {"preemptions": preemptions, "cached": cached}


def client(url: str, model: str, scenario: Scenario, seed: int) -> dict[str, Any]:
    """The result of `vllm bench serve`, each prompt sent once. Prompts of one seed begin alike, whatever their length.

    Raises:
        RuntimeError: Not every request was answered as asked.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": model,
            "base_url": url,
            "dataset_name": "random",
            "random_prefix_len": scenario.document,
            "random_input_len": scenario.prompt - scenario.document,
            "random_output_len": scenario.output,
            "num_prompts": scenario.requests,
            "seed": seed,
            "ignore_eos": True,
            "temperature": 0,
            "ready_check_timeout_sec": 0,  # it sends a prompt
            "num_warmups": 0,
            "save_result": True,
            "save_detailed": True,
            "result_dir": folder,
            "result_filename": "client.json",
        }
        subprocess.run([*VLLM, "bench", "serve", *flags(settings)], check=True)
        result = json.loads((Path(folder) / "client.json").read_text())
    wanted = ([scenario.prompt] * scenario.requests, [scenario.output] * scenario.requests)
    if (result["input_lens"], result["output_lens"]) != wanted:
        raise RuntimeError(
            f"not every request was answered as asked: prompts of {result['input_lens']} tokens, answers of"
            f" {result['output_lens']}, errors {result['errors']}"
        )
    return result


def counted(url: str) -> tuple[int, int]:
    """How many preemptions and how many tokens from the prefix cache a server counts so far."""
    with urllib.request.urlopen(url + "/metrics") as reply:
        metrics = reply.read().decode()

    def total(counter: str) -> int:
        found = re.findall(rf"^{counter}\{{.*\}} (\S+)$", metrics, re.MULTILINE)
        if not found:
            raise RuntimeError(f"the server's /metrics has no {counter}: another version of vLLM?")
        return sum(int(float(number)) for number in found)

    return total("vllm:num_preemptions_total"), total("vllm:prefix_cache_hits_total")


def summary(scenario: Scenario, wall_s: float, ttfts: list[float], tpots: list[float], last: int) -> dict[str, Any]:
    """The columns of a row, from seconds of each request; the one of index `last` began last."""
    return {
        "requests": scenario.requests,
        "prompt": scenario.prompt,
        "output": scenario.output,
        "wall_s": round(wall_s, 3),
        "out_tok_s": round(scenario.requests * scenario.output / wall_s, 2),
        "ttft_median_s": round(statistics.median(ttfts), 3),
        "ttft_max_s": round(max(ttfts), 3),
        "tpot_ms": round(1e3 * statistics.median(tpots), 3),
        "tpot_last_ms": round(1e3 * tpots[last], 3),
    }


@contextlib.contextmanager
def server(model: str, arguments: dict[str, Any], log: Path) -> Iterator[str]:
    """The address of a server for the length of a `with` statement; its weights are drawn."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    # For `/collective_rpc`, by which the weights are drawn.
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}
    command = [*VLLM, "serve", model, *flags(arguments | {"host": "127.0.0.1", "port": port})]
    print(f"server: vllm {shlex.join(command[len(VLLM) :])}\nits log: {log}", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 600
        while not _answers(url + "/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not come up, its log ends with\n{log.read_text()[-5000:]}")
            time.sleep(0.5)
        request = urllib.request.Request(url + "/collective_rpc", json.dumps({"method": "draw_weights"}).encode())
        urllib.request.urlopen(request).close()
        yield url
    finally:
        _end(process)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
        return True
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server with the engine processes of its group: one that stayed would keep the GPU's memory."""
    for number, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.2)
    process.wait()


def flags(arguments: dict[str, Any]) -> list[str]:
    """Arguments of `vllm.LLM` as those of the command line."""
    found = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        else:
            found += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


def plot(path: Path) -> None:
    """Wall time and tokens per second of each scenario, dense beside SPLA."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = json.loads(path.read_text())
    rows = {(r["scenario"], r["backend"]): r for r in result["rows"]}
    names = list(dict.fromkeys(scenario for scenario, _ in rows))
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4))
    panels = (("wall_s", "seconds for all requests", "{:.1f}"), ("out_tok_s", "output tokens per second", "{:.0f}"))
    for axis, (column, title, number) in zip(axes, panels, strict=True):
        for i, backend in enumerate(BACKENDS):
            bars = [(x + 0.4 * i - 0.2, rows[n, backend][column]) for x, n in enumerate(names) if (n, backend) in rows]
            drawn = axis.bar([x for x, _ in bars], [y for _, y in bars], 0.38, label=backend, color=f"C{i}")
            axis.bar_label(drawn, fmt=number, fontsize=8)
        axis.set_xticks(range(len(names)), [name.replace("-http", "\nover HTTP") for name in names])
        axis.set(title=title, axisbelow=True)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"Requests sent at once, {result['model']}, {result['hardware']}")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)


def table(rows: list[dict[str, Any]]) -> str:
    """What is printed last."""
    columns = ("wall_s", "out_tok_s", "ttft_median_s", "ttft_max_s", "tpot_ms", "tpot_last_ms", "preemptions")
    lines = [" ".join([f"{'scenario':13} {'backend':7}", *(f"{name:>13}" for name in columns)])]
    for r in rows:
        lines.append(" ".join([f"{r['scenario']:13} {r['backend']:7}", *(f"{r[name]:13.6g}" for name in columns)]))
    return "\n".join(lines)


def measure(
    backend: str, scenarios: dict[str, Scenario], model: str, arguments: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and rows of scenarios: those without a server first, by one engine, then the others, by one server."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    def announced(http: bool) -> Iterator[tuple[str, Scenario]]:
        for name, s in scenarios.items():
            if s.http == http:
                about = f", about {s.expected_s[backend]} s" if s.expected_s else ""
                print(
                    f"{backend}, {name}: {s.requests} prompts of {s.prompt} tokens, {s.output} more{about}", flush=True
                )
                yield name, s

    if not all(s.http for s in scenarios.values()):
        begin = time.perf_counter()
        llm = LLM(model, disable_log_stats=False, **arguments)
        llm.collective_rpc("draw_weights")
        print(f"{backend}: engine up after {time.perf_counter() - begin:.0f} s", flush=True)
        for name, scenario in announced(http=False):
            yield name, in_process(llm, scenario)
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    if any(s.http for s in scenarios.values()):
        log = Path(tempfile.mkdtemp(prefix="serving-")) / "server.log"
        with server(model, arguments, log) as url:
            for name, scenario in announced(http=True):
                yield name, over_http(url, model, scenario)


def merge(result: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Put an earlier result's rows into `result`.

    Raises:
        ValueError: They were measured with something else.
    """
    known = earlier["versions"]  # a report may name more packages than an earlier one, or fewer
    same = {"versions": all(known.get(name, version) == version for name, version in result["versions"].items())}
    same |= {key: result[key] == earlier[key] for key in ("hardware", "model", "engine_args", "options")}
    for key, agrees in same.items():
        if not agrees:
            raise ValueError(f"the earlier result has other {key}, its rows cannot stand beside new ones: measure anew")
    result["command"] = f"{earlier['command']} && {result['command']}"
    result["rows"] = earlier["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", help="these scenarios (all)")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--small", action="store_true", help="a tiny model and short prompts")
    parser.add_argument("--options", type=json.loads, default={}, help="SPLA options, e.g. '{\"budget\": 1024}'")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="further arguments of the engines, as JSON")
    parser.add_argument("--output", type=Path, help="the result, written after each scenario")
    parser.add_argument("--merge", type=Path, help="keep rows of this result that are not measured now")
    parser.add_argument("--plot", type=Path, help="only draw the rows of this result, as a PNG beside it")
    args = parser.parse_args()
    if args.plot:
        return plot(args.plot)

    setup = SMALL if args.small else LARGE
    names = args.only or list(setup.scenarios)
    if unknown := [name for name in names if name not in setup.scenarios]:
        parser.error(f"unknown scenario {unknown[0]!r}: choose from {', '.join(setup.scenarios)}")
    engine_args = {
        "max_model_len": max(s.prompt + s.output for s in setup.scenarios.values()),
        "max_num_seqs": max(s.requests for s in setup.scenarios.values()),
        "load_format": "dummy",
        "worker_extension_cls": "serving.RandomWeights",
        **setup.engine_args,
        **args.engine_args,
    }
    options = setup.options | args.options
    hardware = report.hardware()
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": report.versions(),
        "hardware": hardware,
        "model": setup.name,
        "engine_args": engine_args,
        "options": options,
        "rows": [],
    }
    if args.merge:
        merge(result, json.loads(args.merge.read_text()))
    if not args.small:
        seconds = sum(setup.scenarios[name].expected_s[backend] for name in names for backend in args.backends)
        print(f"about {seconds} s on an H200, and a minute for each engine to start and to warm up", flush=True)
    # A limit of time ends this by a signal: the server must go, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))

    import torch

    chosen: dict[str, dict[str, Any]] = {
        "dense": {"attention_backend": "FLASH_ATTN"} if torch.cuda.is_available() else {},
        "spla": {"attention_backend": "spla", "additional_config": {"spla": options}},
    }
    order = [(name, backend) for name in setup.scenarios for backend in BACKENDS]
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), setup.config)
        for backend in args.backends:
            scenarios = {name: setup.scenarios[name] for name in names}
            for name, found in measure(backend, scenarios, model, engine_args | chosen[backend]):
                rows = {(r["scenario"], r["backend"]): r for r in result["rows"]}
                rows[name, backend] = {"backend": backend, "scenario": name, **found}
                result["rows"] = [rows[key] for key in order if key in rows]
                print(json.dumps(rows[name, backend]), flush=True)
                if args.output:
                    report.write(result, args.output)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
