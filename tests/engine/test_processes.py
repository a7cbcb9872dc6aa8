"""Spawned engine processes, tensor parallelism and the server, as users start them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from spla_backend.learned import LayerParameters, write

from .conftest import BUDGET, LLAMA, ONE_LEVEL, random_prompt, start_engine

pytestmark = pytest.mark.engine

ENVIRONMENT = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

OFFLINE = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    arguments = json.loads(sys.argv[1])
    prompts = [{"prompt_token_ids": p} for p in json.loads(sys.argv[2])]
    llm = LLM(**arguments)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False))
    print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""


PROMPTS = [random_prompt(n, seed=n) for n in (5, 600)]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Gains of all heads, which ranks share."""
    import torch

    path = tmp_path_factory.mktemp("learned") / "gains.safetensors"
    generator = torch.Generator().manual_seed(0)
    heads = LLAMA["num_attention_heads"]
    layers = {i: LayerParameters(gain=3 * torch.rand(heads, generator=generator)) for i in range(3)}
    write(path, layers, {})
    return {"budget": BUDGET, **ONE_LEVEL, "parameters_file": str(path)}


@pytest.fixture(scope="module")
def expected(tiny_llama, options):
    """Tokens of an engine in this process."""
    with start_engine(tiny_llama, options=options) as engine:
        return [a.tokens for a in engine.answer(PROMPTS, logprobs=False)]


def test_tensor_parallel_in_spawned_processes(tiny_llama, options, expected, tmp_path):
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE)
    arguments = {
        "model": tiny_llama,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 1024,
        "enforce_eager": True,
        "block_size": 32,
        "tensor_parallel_size": 2,
        "attention_backend": "spla",
        "additional_config": {"spla": options},
    }
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(arguments), json.dumps(PROMPTS)],
        # One core a rank: vLLM binds ranks to NUMA nodes of their own unless told otherwise.
        env={**ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))},
        capture_output=True,
        text=True,
        timeout=400,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(lines[0].removeprefix("TOKENS")) == expected


def test_serve(tiny_llama, options, expected, tmp_path):
    """`vllm serve --attention-backend spla`: answers, refuses a bad request, goes on answering, and counts."""
    openai = pytest.importorskip("openai")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", tiny_llama, "--attention-backend", "spla",
        "--additional-config", json.dumps({"spla": options}), "--block-size", "32", "--dtype", "float32",
        "--max-model-len", "1024", "--enforce-eager", "--skip-tokenizer-init", "--served-model-name", "tiny",
        "--return-tokens-as-token-ids", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        wait_until_up(client, server, tmp_path / "server.log")

        def tokens() -> list[int]:
            # Without a tokenizer the server returns ids through its own extension of the completions API.
            reply = client.completions.create(
                model="tiny", prompt=PROMPTS[1], max_tokens=20, temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True, "detokenize": False},
            )  # fmt: skip
            return list(reply.choices[0].token_ids)

        assert tokens() == expected[1]
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt=[5] * 2000, max_tokens=20)
        assert tokens() == expected[1]
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
        counted = dict(
            re.findall(r"^vllm:spla_(\w+)_total{engine=\"0\",model_name=\"tiny\"} (\S+)$", metrics, re.MULTILINE)
        )
        assert float(counted["decode_tokens"]) == 2 * 19  # the first token of an answer is the prompt's
        assert float(counted["pages_read"]) == 2 * 19 * BUDGET / 32
        # The second time most of the prompt is cached, and what is dense of it, too.
        assert float(counted["dense_prompt_tokens"]) == BUDGET
        assert 600 - BUDGET < float(counted["sparse_prompt_tokens"]) < 600
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
        log.close()


def wait_until_up(client, server, log: Path) -> None:
    import openai

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-5000:]
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(1)
    pytest.fail("the server did not come up\n" + log.read_text()[-5000:])


def test_bad_option_stops_the_server(tiny_llama):
    """At start-up, with the sentence where a user sees it, before any engine process is started."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "vllm"), "serve", tiny_llama, "--attention-backend", "spla",
         "--additional-config", '{"spla": {"budgets": 192}}', "--skip-tokenizer-init"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode != 0
    assert "unknown SPLA option 'budgets' (did you mean 'budget'?)" in done.stdout + done.stderr
    assert "EngineCore" not in done.stdout
