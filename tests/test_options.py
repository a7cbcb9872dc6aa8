"""Where options come from, and budgets of layers; what is refused is in engine/test_refusals.py."""

from spla_backend.options import SplaOptions


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
