"""The command of docs/evaluate.md for lm-evaluation-harness, against the harness and the engine it starts."""

import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs" / "evaluate.md"


@pytest.fixture
def command() -> list[str]:
    (line,) = re.findall(r"^lm_eval .*$", DOCS.read_text(), re.M)
    return shlex.split(line)


def model_args(command: list[str]) -> dict:
    return json.loads(command[command.index("--model_args") + 1])


def test_engine_takes_the_arguments(command):
    vllm = pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs

    from spla_backend.options import SplaOptions

    arguments = model_args(command)
    arguments["model"] = arguments.pop("pretrained")
    known = {*inspect.signature(EngineArgs).parameters, *inspect.signature(vllm.LLM).parameters}
    assert set(arguments) <= known
    assert arguments["attention_backend"] == "spla"
    options = SplaOptions.from_sources(arguments["additional_config"]["spla"])
    options.parameters(arguments["block_size"])


def test_harness_takes_the_command(command, monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval._cli.harness import HarnessCLI

    monkeypatch.setattr(sys, "argv", command)
    args = HarnessCLI().parse_args()
    assert args.model == "vllm" and args.model_args == model_args(command)
