"""Write benchmarks/captured_pages.npz: the pages that SmolLM2-135M's tokens select on real text, for the benchmarks.

    python scripts/capture_selections.py "$(spla-model smollm2)"

All of `examples/data/alice.txt` in one sequence, pages of 16 tokens and 32 of them a token, so that a token selects
among ten times as many pages as it may, as far as a text within this model's 8192 positions goes. Recorded are the last
1024 tokens of eight kv heads, each of a layer of its own, and of the selected pages those that were not forced.

`change`: `[8, 1024, ceil(pages / 8)]` uint8, packed bits of the selected pages, each token's exclusive-or with the one
before; `pages`: how many there are.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from spla_backend.evaluate.capture import AttentionInputs, CapturingModel
from spla_backend.evaluate.documents import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (1, 5, 9, 13, 17, 21, 25, 29)
PAGE, BUDGET, FIRST, LAST, QUERIES = 16, 32, 1, 2, 1024


def free_pages(inputs: AttentionInputs, head: int) -> torch.Tensor:
    """`[QUERIES, pages]` bool, rules of `reference.share_in_group` and `select_blocks`."""
    group = inputs.q.shape[0] // inputs.k.shape[0]
    length = inputs.k.shape[1]
    num_pages = length // PAGE
    keys = inputs.k[head, : num_pages * PAGE].unflatten(0, (num_pages, PAGE)).double()
    q = inputs.q[head * group : (head + 1) * group, -QUERIES:].double()  # [group, QUERIES, d], scaled
    s2 = (q**2) @ keys.var(1, correction=0).T
    log_count = torch.tensor(float(PAGE)).log()
    scores = q @ keys.mean(1).T + torch.where(
        s2 < 2 * log_count, s2 / 2, (2 * s2 * log_count).sqrt() - log_count
    )  # [group, QUERIES, pages]
    current = (length - QUERIES + torch.arange(QUERIES)) // PAGE
    page = torch.arange(num_pages)
    scores = scores.masked_fill(page >= current[:, None], -torch.inf)
    shared = (scores - scores.logsumexp(-1, keepdim=True)).logsumexp(0)
    forced = (page < FIRST) | (page > current[:, None] - LAST)
    chosen = shared.masked_fill(forced, -torch.inf).topk(BUDGET - FIRST - LAST).indices
    return torch.zeros(QUERIES, num_pages, dtype=torch.bool).scatter(1, chosen, True)


def main(model: str) -> None:
    text = (ROOT / "examples" / "data" / "alice.txt").read_text(encoding="utf-8")
    tokens = load_tokenizer(model)(text)["input_ids"]
    seen: dict[int, torch.Tensor] = {}

    def visit(inputs: AttentionInputs) -> None:
        if inputs.layer in LAYERS:
            seen[inputs.layer] = free_pages(inputs, LAYERS.index(inputs.layer) % inputs.k.shape[0])

    CapturingModel(model).run(tokens, visit)
    selected = torch.stack([seen[layer] for layer in LAYERS])  # [8, QUERIES, pages]
    bits = np.packbits(selected.numpy(), axis=-1)
    change = bits.copy()
    change[:, 1:] ^= bits[:, :-1]
    path = ROOT / "benchmarks" / "captured_pages.npz"
    np.savez_compressed(path, change=change, pages=selected.shape[-1])
    print(path, path.stat().st_size, f"{len(tokens)} tokens, {selected.shape[-1]} pages")
    for tile in (16, 32, 64):
        union = selected.unflatten(1, (-1, tile)).any(2).sum(-1).double() / (BUDGET - FIRST - LAST)
        print(f"{tile} tokens: union of {union.mean():.2f} times one's, by head", *(f"{x:.2f}" for x in union.mean(1)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
