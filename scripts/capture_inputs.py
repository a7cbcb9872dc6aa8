"""Write tests/data/smollm2_qkv.safetensors: queries, keys and values of SmolLM2-135M on real text, for kernel tests.

    python scripts/capture_inputs.py "$(spla-model smollm2)"

Each kv head comes from a layer of its own, early, middle and late, with the group of query heads that it serves there.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from spla_backend.evaluate.capture import AttentionInputs, CapturingModel
from spla_backend.evaluate.documents import cut_documents, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (2, 15, 28)  # of kv heads 0, 1, 2
TOKENS, QUERIES = 1536, 64


def main(model: str) -> None:
    text = ROOT / "examples" / "data" / "alice.txt"
    document = cut_documents([str(text)], load_tokenizer(model), TOKENS, 1)[0]
    seen: dict[int, AttentionInputs] = {}

    def visit(inputs: AttentionInputs) -> None:
        if inputs.layer in LAYERS:
            seen[inputs.layer] = inputs

    CapturingModel(model).run(document.tokens, visit)
    q, k, v = [], [], []
    for head, layer in enumerate(LAYERS):
        inputs = seen[layer]
        group = inputs.q.shape[0] // inputs.k.shape[0]
        q.append(inputs.q[head * group : (head + 1) * group, -QUERIES:] * inputs.q.shape[-1] ** 0.5)  # unscaled again
        k.append(inputs.k[head : head + 1])
        v.append(inputs.v[head : head + 1])
    tensors = {
        name: torch.cat(parts).transpose(0, 1).to(torch.float16).contiguous()  # [tokens, heads, head_size]
        for name, parts in {"q": q, "k": k, "v": v}.items()
    }
    assert all(bool(x.isfinite().all()) for x in tensors.values())
    path = ROOT / "tests" / "data" / "smollm2_qkv.safetensors"
    save_file(tensors, path, {"model": "SmolLM2-135M-Instruct", "text": text.name, "layers": str(LAYERS)})
    print(path, path.stat().st_size)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
