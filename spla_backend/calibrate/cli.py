"""`spla-calibrate`: fit gains and scales, dense layers, or budgets of layers to a model on the user's text."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Fit gains (by head) and scales (by layer) of SPLA's residual to a frozen model, by distillation from its own dense
attention on your text; with --dense-layers, leave the layers dense that lose most under SPLA; with --budgets, spread
the budget over the layers by what it saves there. Write
spla.safetensors, which `vllm serve` picks up from the model's folder. Fetches nothing. A table compares before and
after on held-out text.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0, or 1 after one sentence on standard error.
    """
    args = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from . import run

        print(run.run(args))
    except ImportError as error:
        print(f"spla-calibrate: {error}: install vllm-spla with the extra of an engine, cpu or cuda", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"spla-calibrate: {error}", file=sys.stderr)
        return 1
    return 0


def count(text: str) -> int:
    """For argparse."""
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def _parser() -> argparse.ArgumentParser:
    from ..evaluate.cli import json_object, positive

    parser = argparse.ArgumentParser(prog="spla-calibrate", description=_DESCRIPTION)
    add: Any = parser.add_argument
    add("--model", required=True, help="a local model folder (spla-model makes one)")
    add("--text", nargs="+", required=True, metavar="FILE", help="text to fit on: long files, UTF-8, like your use")
    add(
        "--test",
        nargs="+",
        metavar="FILE",
        help="text to judge on; default: the first --test-length tokens of every file, which are then not fitted on",
    )
    add("--options", type=json_object, default={}, metavar="JSON", help="SPLA options to fit for; default: SPLA's")
    add("--page-size", type=positive, default=64, metavar="TOKENS", help="default: %(default)s")
    add("--length", type=positive, default=4096, help="tokens of a window to fit on, beyond the budget (%(default)s)")
    add("--test-length", type=positive, default=8192, help="tokens of a document to judge on (%(default)s)")
    add("--test-documents", type=positive, metavar="N", help="documents a --test file; default: all that fit")
    add(
        "--steps",
        type=count,
        help="windows to fit gains and scales on, one a step (40; 0 with --dense-layers, --budgets)",
    )
    add(
        "--dense-layers",
        type=positive,
        metavar="N",
        help="first leave the N layers dense whose being sparse costs most: added to the option dense_layers",
    )
    add(
        "--budgets",
        type=positive,
        nargs="?",
        const=6,
        metavar="N",
        help="first fit budgets of (the other) layers, of the same sum, on N windows (%(const)s): option layer_budgets",
    )
    add("--learning-rate", type=float, default=0.08, help="of Adam (%(default)s)")
    add("--features", action="store_true", help="of the residual 'linear', fit a matrix before the feature map, too")
    add("--seed", type=int, default=0, help="of the order of windows and all that is drawn (%(default)s)")
    add("--device", help="default: the GPU if there is one")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen model (%(default)s)")
    add("--output", type=Path, metavar="FILE", help="default: spla.safetensors in the model's folder")
    add("--report", type=Path, metavar="JSON", help="write the table, the steps and the settings")
    return parser


if __name__ == "__main__":
    sys.exit(main())
