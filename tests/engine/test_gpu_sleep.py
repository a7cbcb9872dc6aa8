"""Sleep mode on a GPU: the same answers after sleep of every level, and after weights were loaded again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spla_backend import learned

from .conftest import save_random_model
from .test_gpu import BUDGET, ENGINE_ARGS, MODEL, PROMPTS, ROUNDING, Answer, assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

HEADS, SIZE = MODEL["num_attention_heads"], MODEL["head_dim"]
SCRIPT = Path(__file__).with_name("sleep_cycles.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("gpu") / "llama", MODEL, std=0.05)


def gains(draw):
    return {"gain": 3 * draw(HEADS), "residual_scale": draw(1)}


def norms(draw):
    return {"exact_norm": 0.5 + draw(HEADS, SIZE), "tail_norm": 0.3 * draw(HEADS, SIZE)}


def write_parameters(path, make):
    generator = torch.Generator().manual_seed(0)
    layers = {
        i: learned.LayerParameters(**make(lambda *size: torch.rand(size, generator=generator)))
        for i in range(MODEL["num_hidden_layers"])
    }
    learned.write(path, layers, {})


@pytest.mark.parametrize(
    ("options", "parameters", "engine_args"),
    [
        ({}, None, {}),
        ({}, None, {"enforce_eager": True, "max_num_batched_tokens": 256, "max_num_seqs": 16}),
        ({"prefill_dense_below": 4096, "candidates": 1}, None, {}),
        ({"executor": "flashinfer"}, None, {}),
        ({"dense_layers": [1]}, gains, {}),
        ({"residual": "linear", "combine": "double_rmsnorm", "selector": "taylor2"}, norms, {}),
        (None, None, {}),
    ],
    ids=["graphs", "eager-in-chunks", "two-levels", "flashinfer", "gains", "norms", "flash-attention"],
)
def test_same_answers_after_sleep(model, tmp_path, options, parameters, engine_args):
    """One batch of prompts of 5 to 3000 tokens, so that steps are the same each time; FlashAttention shows what the
    engine itself does to answers."""
    arguments = {"model": model, "skip_tokenizer_init": True, "enable_prefix_caching": False, **ENGINE_ARGS}
    arguments |= engine_args | {"attention_backend": "FLASH_ATTN"}
    if options is not None:
        if options.get("executor") == "flashinfer":
            pytest.importorskip("flashinfer")
        options = {"budget": BUDGET, "prefill_dense_below": 0, **options}
        if parameters:
            write_parameters(tmp_path / "learned.safetensors", parameters)
            options["parameters_file"] = str(tmp_path / "learned.safetensors")
        arguments |= {"attention_backend": "spla", "additional_config": {"spla": options}}
    files = [tmp_path / name for name in ("arguments.json", "prompts.json", "answers.json")]
    files[0].write_text(json.dumps(arguments))
    files[1].write_text(json.dumps(PROMPTS))
    done = subprocess.run([sys.executable, SCRIPT, *files], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("sleep of level")))
    found = json.loads(files[2].read_text())
    answers = {
        name: [Answer(a["tokens"], [{int(t): x for t, x in entry.items()} for entry in a["logprobs"]]) for a in batch]
        for name, batch in found["answers"].items()
    }
    first = answers.pop("first")
    for name, batch in answers.items():
        print(name)
        assert_same(batch, first, ROUNDING)
    if options is not None:
        print(found["pools"])
        assert set(found["pools"]) <= {"runtime", "workspace", "torch"}  # the last is memory that nobody takes away
        assert {"gain", "salt", "_counter", "fold_arrivals", "attend_arrivals"} <= set(found["pools"]["runtime"])
        assert {"scores", "flags", "part_out"} <= set(found["pools"]["workspace"])
