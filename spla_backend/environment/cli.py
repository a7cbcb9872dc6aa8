"""`spla-env`: a report of what is installed, and of what SPLA makes of a model, to paste into an issue."""

import argparse
import os
import sys
from collections.abc import Sequence

_DESCRIPTION = """\
Print a report to paste into an issue: versions, devices, whether vLLM finds the plugin, and whether the run-time
patches fit this vLLM. With --model, also which layers of the model SPLA computes and which it leaves to other
backends, or the sentence with which vLLM would refuse to start. No engine is started and no weights are read.
"""
_EPILOG = """\
With --model, all other options are those of `vllm serve`, such as --additional-config '{"spla": {"budget": 1024}}'.
Without --attention-backend and --attention-config the backend is spla.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0, whatever the report says.
    """
    parser = argparse.ArgumentParser(
        prog="spla-env",
        usage="spla-env [-h] [--model FOLDER_OR_NAME [OPTIONS OF vllm serve ...]]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="FOLDER_OR_NAME", help="a model, as `vllm serve` takes it")
    args, options = parser.parse_known_args(argv)
    if options and args.model is None:
        parser.error(f"{options[0]} is an option for a model, and there is no --model")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    from . import report

    for section in report.sections(args.model, options):
        print(section, end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
