"""Which rows of a step are decode rows, and which lengths the host takes for known."""

import pytest
import torch

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine

NUM_DRAFTS = 4
NEVER = -1  # a length that nobody may look at


def plan(query_lens, lens, bound, prompts, *, num_drafts=NUM_DRAFTS):
    """The `Step` of rows whose sequences are `lens` tokens long, as the device says, and at most `bound`, as the host
    does; `prompts` names the rows that are prompts."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from spla_backend.engine.builder import SplaMetadataBuilder

    builder = object.__new__(SplaMetadataBuilder)
    builder.device, builder.reorder_batch_threshold = torch.device("cpu"), 1 + num_drafts
    rows = len(query_lens)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return builder._step(
        CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            num_reqs=rows,
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(query_lens),
            max_seq_len=4096,
            block_table_tensor=torch.zeros(rows, 8, dtype=torch.int32),
            slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
            is_prefilling=torch.tensor([row in prompts for row in range(rows)]),
            seq_lens_cpu_upper_bound=None if bound is None else torch.tensor(bound, dtype=torch.int32),
        )
    )


def decodes(step):
    return step.num_decodes, step.num_decode_tokens, step.decode_query_len


def prefills(step):
    return step.prefill_starts, step.prefill_lens


@pytest.mark.parametrize("query_lens", [[5, 5, 5], [4, 5, 5, 3, 1], [1, 5], [2, 2], [3, 4, 2, 0, 0]])
def test_rows_of_any_number_of_drafts_are_decode_rows(query_lens):
    """Whatever the host takes for their lengths; padding too."""
    step = plan(query_lens, [300 if n else 0 for n in query_lens], [NEVER] * len(query_lens), ())
    assert decodes(step) == (len(query_lens), sum(query_lens), 1 + NUM_DRAFTS)
    assert step.prefill_lens == []


@pytest.mark.parametrize("num_drafts", [0, NUM_DRAFTS])
def test_rows_of_one_token(num_drafts):
    assert decodes(plan([1, 1], [9, 300], [NEVER, NEVER], (), num_drafts=num_drafts)) == (2, 2, 1)


def test_prompts_behind_drafts():
    """The end of a prompt counts as a decode row; a chunk, a prompt of few tokens behind it and padding do not. What
    the host knows of these is not asked of the device."""
    step = plan([4, 5, 2, 100, 3, 0], [302, 50, 700, NEVER, NEVER, NEVER], [304, 54, NEVER, 900, 3, 0], (2, 3, 4))
    assert decodes(step) == (3, 11, 1 + NUM_DRAFTS)
    assert prefills(step) == ([11, 111, 114, 114], [900, 3, 0])


def test_without_drafts():
    step = plan([1, 2, 100], [300, 30, 900], [300, 30, 900], (1, 2), num_drafts=0)
    assert decodes(step) == (1, 1, 1) and prefills(step) == ([1, 3, 103], [30, 900])


@pytest.mark.parametrize("bound", [[304, 900, 54], None], ids=["optimistic", "unknown"])
def test_lengths_that_the_host_does_not_know_come_from_the_device(bound):
    """Drafts behind a prompt, as where another backend of the model orders the batch."""
    step = plan([5, 100, 5], [302, 900, 50], bound, (1,))
    assert decodes(step) == (1, 5, 1 + NUM_DRAFTS) and prefills(step) == ([5, 105, 110], [900, 50])
