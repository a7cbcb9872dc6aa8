"""The log of a sum of exponentials over a loop: kept as its largest exponent and the sum over that, element by element,
and reduced once behind the loop."""

import triton
import triton.language as tl


@triton.jit
def add_exponentials(top, total, x):
    """`top` and `total` with `exp(x)` added; all of one shape, exponents may be -inf."""
    new_top = tl.maximum(top, x)
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, total * tl.exp(top - safe) + tl.exp(x - safe)


@triton.jit
def log_of_columns(top, total):
    """Log of the sum over rows of `total * exp(top)` `[ROWS, N]`: `[N]`, -inf where nothing was added."""
    best = tl.max(top, axis=0)
    safe = tl.where(best == float("-inf"), 0.0, best)
    whole = tl.sum(total * tl.exp(top - safe[None, :]), axis=0)
    return tl.where(whole > 0, safe + tl.log(tl.where(whole > 0, whole, 1.0)), float("-inf"))
