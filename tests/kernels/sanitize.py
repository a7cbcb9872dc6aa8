"""Small cases on a GPU for `scripts/sanitize.sh`, compared with the float64 reference as well."""

import sys
from typing import Any

import torch
from test_triton_prefill import check as check_prefill
from triton_cases import make_batch

from spla_backend.algorithm.parameters import SplaParameters

TWO_LEVELS = {"page_size": 32, "selection_block": 32, "budget_blocks": 3, "fine_block": 16}
SHAPE = {"num_heads": 8, "num_kv_heads": 2, "head_size": 64, "device": "cuda"}


def decode(query_len: int, score_blocks: int = 0, **options: Any) -> None:
    """Rows beyond the budget, within it and padded: pages completed by the token itself (320), states folded from
    nothing, by one page, and not at all."""
    params = SplaParameters(**{"page_size": 16, "selection_block": 16, "budget_blocks": 6} | options)
    batch = make_batch(params, [319, 200, 40, 0], query_len=query_len, **SHAPE)
    if score_blocks:
        batch.op.fused.fixed_score_blocks = score_blocks
    batch.decode()
    batch.keys[0] = torch.cat([batch.keys[0], batch.keys[0][:1]])
    batch.values[0] = torch.cat([batch.values[0], batch.values[0][:1]])
    batch.write(0, 319, 320)  # completes a page: statistics and stamp
    batch.lengths[0] = 320
    batch.seq_lens[0] = 320
    batch.decode()
    output = batch.decode()
    batch.check(output, 3e-3)


def prefill(statistics_dtype: str = "auto") -> None:
    """Two rows, one of them behind a cached prefix, in several passes."""
    params = SplaParameters(16, 16, 4, statistics_dtype=statistics_dtype)
    batch = make_batch(params, [130, 90], **SHAPE)
    check_prefill(batch, [(70, 130), (0, 90)], 5e-3, sample=23, max_groups=4)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        {
            "decode": lambda: decode(1),
            "decode-fp8": lambda: decode(1, statistics_dtype="fp8"),
            "decode-scored-ahead": lambda: decode(1, score_blocks=2),
            "decode-two-levels": lambda: decode(1, **TWO_LEVELS),
            "decode-sketches": lambda: decode(1, **TWO_LEVELS, fine_source="int4", statistics_dtype="fp8"),
            "verify": lambda: decode(2),
            "prefill": prefill,
            "prefill-fp8": lambda: prefill("fp8"),
        }[case]()
        torch.cuda.synchronize()
        print(case, "agrees with the reference")
