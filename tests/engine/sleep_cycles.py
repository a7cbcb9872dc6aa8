"""Answers of an engine before and after it slept, in every way there is, and where its kernels' tensors lie. For
`test_gpu_sleep.py`, a process an engine: vLLM's allocator serves one a process.

    python sleep_cycles.py ENGINE_ARGS.json PROMPTS.json ANSWERS.json
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # memory is looked at, and written to while the engine sleeps
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import torch

TOKENS, TOP = 40, 20


def ask(llm: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=TOP)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [{token: x.logprob for token, x in entry.items()} for entry in output.outputs[0].logprobs],
        }
        for output in outputs
    ]


def sleep(llm: Any, level: int) -> None:
    """Then write to memory that was given back, so that nothing comes back as it was by luck. What is written is finite
    in every dtype: dense attention multiplies what lies behind a sequence by zero."""
    llm.sleep(level)
    free, _ = torch.cuda.mem_get_info()
    print(f"sleep of level {level} leaves {free >> 20} MiB free", flush=True)
    junk = [torch.full((1 << 30,), 0x3C, dtype=torch.uint8, device="cuda") for _ in range(min(4, (free >> 30) - 1))]
    torch.cuda.synchronize()
    del junk
    torch.cuda.empty_cache()


def reload(llm: Any) -> None:
    llm.collective_rpc("reload_weights")


def level_1(llm: Any) -> None:
    sleep(llm, 1)
    llm.wake_up()


def level_1_in_steps(llm: Any) -> None:
    sleep(llm, 1)
    llm.wake_up(["weights"])
    llm.wake_up(["kv_cache"])


def level_2(llm: Any) -> None:
    sleep(llm, 2)
    llm.wake_up(["weights"])
    reload(llm)
    llm.wake_up(["kv_cache"])


CYCLES = {
    "again": lambda llm: None,
    "level 1": level_1,
    "level 2": level_2,
    "level 2 once more": level_2,
    "level 1 in steps": level_1_in_steps,
    "weights loaded again": reload,
}


def pools(llm: Any) -> dict[str, list[str]]:
    """Names of the kernels' tensors by the pool of vLLM's that they lie in; `torch` where it is none."""
    from held_tensors import held_tensors
    from vllm.device_allocator.cumem import CuMemAllocator

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    ops = [layer.impl.op for layer in layers if type(getattr(layer, "impl", None)).__name__ == "SplaImpl"]
    assert None not in ops
    found = defaultdict(set)
    for name, tensor in held_tensors(*ops):
        if tensor.is_cuda and tensor.numel():
            address, tag = tensor.data_ptr(), "torch"
            for start, data in CuMemAllocator.get_instance().pointer_to_data.items():
                if start <= address < start + data.handle[1]:
                    tag = data.tag
            found[tag].add(name)
    return {tag: sorted(names) for tag, names in found.items()}


def main(engine_args: Path, prompts: Path, result: Path) -> None:
    from vllm import LLM

    llm = LLM(**json.loads(engine_args.read_text()), enable_sleep_mode=True)
    texts = json.loads(prompts.read_text())
    answers = {"first": ask(llm, texts)}
    for name, cycle in CYCLES.items():
        cycle(llm)
        answers[name] = ask(llm, texts)
    result.write_text(json.dumps({"answers": answers, "pools": pools(llm)}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
