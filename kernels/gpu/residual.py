"""Residuals as the kernels know them: compile-time constants, by the names of `SplaParameters.residual`."""

import triton.language as tl

NO_RESIDUAL = tl.constexpr(0)
REGRESSION = tl.constexpr(1)
LINEAR = tl.constexpr(2)
RESIDUAL_CODES = {"none": 0, "regression": 1, "linear": 2}
