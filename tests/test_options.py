"""Where options come from, and budgets of layers; most of what is refused is in engine/test_refusals.py."""

import pytest
import torch

from spla_backend.algorithm.selectors import MeanSelector, register_selector
from spla_backend.kernels.layout import layouts
from spla_backend.options import SplaOptions


def test_statistics_dtype():
    options = {"budget": 2048, "selector": "km2-rem", "selection_block_size": 256, "statistics_dtype": "fp8"}
    with pytest.raises(
        ValueError, match="counts up to 255 tokens with statistics_dtype 'fp8', and its blocks have 256"
    ):
        SplaOptions.from_sources(options).parameters(256)
    assert SplaOptions.from_sources({**options, "statistics_dtype": "auto"}).parameters(256).statistics_dtype == "auto"
    params = SplaOptions.from_sources({**options, "selector": "rem"}).parameters(256)
    page, _ = layouts(params, 64, torch.bfloat16)
    assert params.statistics_dtype == "fp8" and page.statistics_bytes == 128


def test_two_levels():
    options = SplaOptions.from_sources({"budget": 1024, "candidates": 3000, "layer_budgets": {"1": 512}})
    params = options.parameters(64)
    assert (params.fine_block, params.candidate_blocks, params.attended_block) == (16, 46, 16)
    assert options.parameters(64, 1).budget_tokens == 512 and options.parameters(64, 1).candidate_blocks == 46
    assert SplaOptions(budget=2048, candidates=3000).parameters(64).candidate_blocks == 64  # two budgets
    assert SplaOptions.from_sources({"fine_block_size": 0}, {"fine_block_size": 16}).parameters(64).attended_block == 64
    for wrong in ({"fine_block_size": 12}, {"fine_block_size": -16}, {"candidates": 0}, {"candidates": 2.5}):
        with pytest.raises(ValueError, match=r"fine_block_size must be|candidates must be an integer of at least 1"):
            SplaOptions.from_sources(wrong)
    with pytest.raises(ValueError, match=r"fine_block_size must divide .* of 64 tokens, not be 24: set it to 16, or"):
        SplaOptions.from_sources({"fine_block_size": 24}).parameters(64)


def test_defaults_follow_the_selector_and_the_executor():
    """Two levels by sketches with statistics in fp8, or what comes nearest."""

    def of(**options):
        params = SplaOptions(**options).parameters(64)
        return params.fine_block, params.candidate_blocks * 64, params.fine_source, params.statistics_dtype

    assert of() == (16, 8192, "int4", "fp8")
    assert of(selector="quest", residual="none") == (16, 8192, "keys", "fp8")
    assert of(selector="km2-rem")[2] == "keys"
    assert of(executor="flashinfer")[0] == of(fine_block_size=0)[0] == 0
    assert of(statistics_dtype="auto") == (16, 8192, "int4", "auto")
    assert of(selector="km2-rem", selection_block_size=64)[3] == "fp8"
    assert SplaOptions(selector="km2-rem", selection_block_size=256).parameters(256).statistics_dtype == "auto"


def test_fine_source():
    int4 = {"fine_block_size": 16, "fine_source": "int4"}
    params = SplaOptions.from_sources(int4).parameters(64)
    assert params.fine_source == "int4" and params.has_sketch
    page, _ = layouts(params, 128, torch.bfloat16)
    assert page.sketch_bytes == 64 * 4 * 18 and page.statistics_rows == 10
    for selector in ("rem", "quest"):
        one_level = {"fine_block_size": 0, "fine_source": "int4", "selector": selector, "residual": "none"}
        params = SplaOptions.from_sources(one_level).parameters(64)
        assert not params.has_sketch and layouts(params, 128, torch.bfloat16)[0].sketch_bytes == 0
    with pytest.raises(ValueError, match="unknown SPLA fine_source 'int8': choose one of keys, int4"):
        SplaOptions.from_sources({"fine_source": "int8"})
    for selector in ("quest", "km2-rem"):
        with pytest.raises(ValueError, match=f"'{selector}' does not keep the mean .*: set fine_source to 'keys' or"):
            SplaOptions.from_sources({**int4, "selector": selector, "residual": "none"})


def test_a_selector_without_formats():
    class Mine(MeanSelector):
        name = "mine"

        def formats(self, head_size):
            return None

    register_selector(Mine)
    params = SplaOptions.from_sources({"selector": "mine"}).parameters(64)
    assert (params.selector, params.statistics_dtype) == ("mine", "auto")
    with pytest.raises(ValueError, match=r"'mine' does not say how to store its statistics in fp8 .*to 'auto'"):
        SplaOptions.from_sources({"selector": "mine", "statistics_dtype": "fp8"})


def test_budgets_of_layers():
    options = SplaOptions.from_sources({"layer_budgets": {"7": 4096, 0: 512}, "dense_layers": [2], "budget": 1024})
    assert options.layer_budgets == {0: 512, 7: 4096} and list(options.layer_budgets) == [0, 7]
    assert [options.largest_budget(n) for n in (8192, 4096, 512)] == [4096, 1024, 0]
    assert hash(options) == hash(options)
    layers = options.layers(64, range(9))
    assert max(params.budget_blocks * params.selection_block for params in layers.values()) == 4096
    assert {i: params.budget_blocks for i, params in layers.items()} == {
        **dict.fromkeys((1, 3, 4, 5, 6, 8), 16),
        0: 8,
        7: 64,
    }
    assert options.parameters(64).budget_blocks == 16


def test_budgets_come_from_one_source():
    """A budget of the command line is not for some layers only, because a file was fitted for others."""
    of_file = {"budget": 1024, "layer_budgets": {"0": 512}, "selector": "mean"}
    assert SplaOptions.from_sources({"selector": "rem"}, of_file).layer_budgets == {0: 512}
    alone = SplaOptions.from_sources({"budget": 2048}, of_file)
    assert alone.layer_budgets == {} and (alone.budget, alone.selector) == (2048, "mean")
    both = SplaOptions.from_sources({"layer_budgets": {"1": 640}}, None, of_file)
    assert both.layer_budgets == {1: 640} and both.budget == 1024


def test_dense_layers_go_before_budgets_from_behind():
    of_file = {"budget": 1024, "layer_budgets": {"0": 512, "1": 2048}, "dense_layers": [2]}
    mine = SplaOptions.from_sources({"dense_layers": [1]}, None, of_file)
    assert mine.dense_layers == (1,) and mine.layer_budgets == {0: 512} and mine.budget == 1024
    assert SplaOptions.from_sources({"dense_layers": []}, of_file).layer_budgets == {0: 512, 1: 2048}
    with pytest.raises(ValueError, match="both name layer 1"):
        SplaOptions.from_sources({"dense_layers": [1], "layer_budgets": {"1": 512}})
