"""`spla-eval`: what SPLA costs a model in answer quality, dense and SPLA side by side."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..options import RefusedError

_DESCRIPTION = """\
What SPLA costs a model in answer quality, dense and SPLA side by side. Texts are your files, tasks are generated from
a seed; nothing is fetched. docs/evaluate.md explains the numbers.
"""
_OPTIONS_HELP = (
    "sets of SPLA options to compare: JSON objects, e.g. '{\"budget\": 1024}', or a JSON file of {name: options}; "
    "default: SPLA's defaults"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0, or 1 after one sentence on standard error.
    """
    args = _parser().parse_args(argv)
    # Standard output is for the result.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; ignored on a GPU.
    # Engines run one after the other in this process: another process takes longer to start than most of them run.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        if args.command == "plot":
            from . import plots

            try:
                result = json.loads(args.report.read_text())
            except ValueError as error:
                raise ValueError(f"{args.report} is no JSON report: {error}") from error
            plots.plot(result, args.image)
            return 0
        _check_outputs(args)
        module = _module(args.command)

        def save(result: dict[str, Any]) -> None:
            if args.output:
                from . import report

                report.write(result, args.output)

        result = module.run(args, save)
        if args.plot:
            from . import plots

            plots.plot(result, args.plot)
        print(module.table(result))
    except ImportError as error:
        print(f"spla-eval: {error}: install vllm-spla with the extras eval and cpu or cuda", file=sys.stderr)
        return 1
    except (OSError, ValueError, RefusedError) as error:
        print(f"spla-eval: {error}", file=sys.stderr)
        return 1
    return 0


def _module(command: str) -> Any:
    if command == "perplexity":
        from . import perplexity

        return perplexity
    if command == "fidelity":
        from . import fidelity_report

        return fidelity_report
    from . import task_report

    return task_report


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse before the work what could not be written after it."""
    for path in (args.output, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    if args.plot is not None:
        import matplotlib  # noqa: F401 - the error, if any, before the work


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spla-eval", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", required=True, help="a local model folder (spla-model makes one)")
    common.add_argument("--options", nargs="+", default=[], metavar="JSON", help=_OPTIONS_HELP)
    common.add_argument("--page-size", type=int, default=64, metavar="TOKENS", help="default: %(default)s")
    common.add_argument("--output", type=Path, metavar="JSON", help="write the report")
    common.add_argument("--plot", type=Path, metavar="PNG", help="write a plot; `spla-eval plot` does it later, too")

    seed = argparse.ArgumentParser(add_help=False)
    seed.add_argument("--seed", type=int, default=0, help="default: %(default)s")

    engine = argparse.ArgumentParser(add_help=False)
    engine.add_argument(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help='further arguments of vllm.LLM, e.g. \'{"dtype": "float32", "tensor_parallel_size": 2}\'',
    )

    text = argparse.ArgumentParser(add_help=False)
    text.add_argument("--text", nargs="+", required=True, metavar="FILE", help="long text files, UTF-8")
    text.add_argument("--length", type=positive, default=8192, help="tokens a document (%(default)s)")
    text.add_argument("--documents", type=positive, metavar="N", help="documents a file; default: all that fit")

    sub = commands.add_parser("perplexity", parents=[common, engine, text], help="loss on long text, by position")
    sub.add_argument(
        "--through",
        default="vllm",
        choices=["vllm", "transformers"],
        help="what runs the model; transformers knows every selector and block size, without kernels (%(default)s)",
    )
    sub.add_argument(
        "--buckets", nargs="+", type=positive, metavar="POSITION", help="where buckets of positions begin and end"
    )

    sub = commands.add_parser(
        "fidelity", parents=[common, text, seed], help="attention mass captured, and output error"
    )
    sub.add_argument("--selectors", nargs="+", help="default: all")
    sub.add_argument("--block-sizes", nargs="+", type=positive, help="default: 16 32 64, as far as they divide a page")
    sub.add_argument("--budgets", nargs="+", type=positive, default=[512, 1024, 2048])
    sub.add_argument("--residuals", nargs="+", default=["none", "regression"], choices=["none", "regression", "linear"])
    sub.add_argument(
        "--mass-only", action="store_true", help="leave out the output error, which takes most of the time"
    )
    sub.add_argument("--queries", type=positive, default=128, help="queries looked at in a document (%(default)s)")
    sub.add_argument("--start", type=int, help="first position of a query; default: the middle of the document")
    sub.add_argument("--layers", nargs="+", type=int, help="default: all")
    sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])

    from .tasks import TASKS

    sub = commands.add_parser("tasks", parents=[common, engine, seed], help="retrieval tasks made from a seed")
    sub.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="default: all")
    sub.add_argument("--lengths", nargs="+", type=positive, default=[4096], help="tokens of prompt and answer")
    sub.add_argument("--samples", type=positive, default=20, help="of each task and length (%(default)s)")

    sub = commands.add_parser("plot", help="the plot of a report")
    sub.add_argument("report", type=Path)
    sub.add_argument("image", type=Path)
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is needed, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
