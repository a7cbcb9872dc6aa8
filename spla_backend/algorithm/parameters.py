"""What SPLA computes, as one immutable value (docs/design.md, 1 to 4)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    import torch

RESIDUALS = ("regression", "linear", "none")
COMBINES = ("shared_normalizer", "double_rmsnorm")


@dataclass(frozen=True)
class SplaParameters:
    """Parameters of the algorithm, in selection blocks; `spla_backend.options` makes them from a user's options.

    Attributes:
        page_size: Tokens a page (`B`).
        selection_block: Tokens a selection block (`b`), divides `page_size`.
        budget_blocks: What a token attends to exactly, in selection blocks, forced ones included (`n`).
        first_blocks: Leading blocks always selected (attention sink).
        last_blocks: Trailing blocks always selected, the current one included.
        selector: Name of a selector in `spla_backend.algorithm.selectors`.
        statistics_dtype: How statistics are stored: `auto`, in the cache dtype, or `fp8`, in a byte an element.
        fine_block: Tokens a fine block (`f`), divides `selection_block`: selection in two levels
            (`spla_backend.algorithm.two_level`); 0 selects whole selection blocks.
        least_candidates: Candidates of the fine level, in selection blocks; there are never fewer than two budgets.
        fine_source: What the fine level reads of candidates: `keys`, or `int4`, a sketch of them in the page
            (`spla_backend.algorithm.sketch`).
        fine_dtype: What the fine level multiplies: `auto`, keys and queries as they are, or these rounded to `bf16` or
            `fp8` (`spla_backend.algorithm.two_level`). No engine sets it.
        tile: Neighbouring tokens that share a selection (`spla_backend.algorithm.tiles`), divides `page_size`; 1 in
            decode. No engine sets it.
        tile_step: Every how many-th token of a tile is scored to select, divides `tile`. No engine sets it.
        candidate_tile: Neighbouring tokens that share their candidates, in two levels: a multiple of `tile`, divides
            `page_size`; 0 stands for `tile`. No engine sets it.
        top_p: Stop selecting once this share of the estimated mass is covered; None keeps the whole budget.
        residual: `regression`, `linear` (the paper's) or `none`.
        feature_map: Name of a feature map, used by the `linear` residual.
        residual_scale: Factor on the covariance term of the `regression` residual; a tensor `[1]` where it is fitted.
        combine: `shared_normalizer` or `double_rmsnorm`.
        rms_norm_eps: Epsilon of the `double_rmsnorm` combination.
    """

    page_size: int
    selection_block: int
    budget_blocks: int
    first_blocks: int = 1
    last_blocks: int = 2
    selector: str = "rem"
    statistics_dtype: str = "auto"
    fine_block: int = 0
    least_candidates: int = 0
    fine_source: str = "keys"
    fine_dtype: str = "auto"
    tile: int = 1
    tile_step: int = 1
    candidate_tile: int = 0
    top_p: float | None = None
    residual: str = "regression"
    feature_map: str = "softmax"
    residual_scale: Union[float, "torch.Tensor"] = 0.5
    combine: str = "shared_normalizer"
    rms_norm_eps: float = 1e-6

    @property
    def blocks_per_page(self) -> int:
        return self.page_size // self.selection_block

    @property
    def candidate_blocks(self) -> int:
        """Candidates of the fine level, in selection blocks; 0 with one level."""
        return max(self.least_candidates, 2 * self.budget_blocks) if self.fine_block else 0

    @property
    def coarse_tile(self) -> int:
        """Neighbouring tokens that share what statistics choose: candidates, or with one level the selection."""
        return self.candidate_tile or self.tile

    @property
    def whole_blocks(self) -> int:
        """Selection blocks of a row up to which all of it is attended to: the budget, or with two levels twice as many,
        because for few rows choosing a half takes longer than reading all (docs/performance.md)."""
        return 2 * self.budget_blocks if self.fine_block else self.budget_blocks

    @property
    def has_sketch(self) -> bool:
        """Whether pages hold a sketch of their keys."""
        return self.fine_block > 0 and self.fine_source == "int4"

    @property
    def attended_block(self) -> int:
        """Tokens of the blocks that are attended to: fine blocks, or selection blocks where there is one level."""
        return self.fine_block or self.selection_block

    @property
    def budget_tokens(self) -> int:
        """Tokens a token attends to exactly, where some are left out."""
        return self.budget_blocks * self.selection_block

    @property
    def whole_tokens(self) -> int:
        """Tokens of a row up to which all of it is attended to."""
        return self.whole_blocks * self.selection_block

    @property
    def max_forced_blocks(self) -> int:
        """The most blocks that rule 3 of docs/design.md, 1 can force: the smallest budget that works."""
        of_tile = max(1, self.tile // self.selection_block)
        return self.first_blocks + max(self.last_blocks - 1 + of_tile, self.blocks_per_page)


def check_sinks(combine: str) -> None:
    """What a layer with learned attention sinks cannot have.

    Raises:
        ValueError: A combination that makes nothing of them.
    """
    if combine == "double_rmsnorm":
        raise ValueError(
            "combine 'double_rmsnorm' would undo learned attention sinks, being an RMSNorm of what they scale: set "
            "combine to 'shared_normalizer'"
        )
