"""Text to train on from what is installed: nothing is downloaded.

    python examples/training_text.py --output text.npz

Code is Python's standard library and installed packages. Prose is technical: docstrings, each module's in one piece,
and the Markdown, reStructuredText and text files of installed packages. A module whose docstrings are long enough to be
a piece of prose is not used as code. Held out are long documents of both kinds: the language reference that `help()`
prints (`pydoc_data.topics`), and some of the longest files of the standard library; what shares many lines with them (a
package's copy of a module) is left out of the rest. Much of this a language model has seen before: differences between
variants mean something here, the perplexities themselves little.
"""

import argparse
import ast
import sys
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

HELD_OUT_BYTES = 60_000
"""Standard library files of at least this size are candidates for holding out; every third of them is."""
PIECE = 2000
"""Characters of the shortest piece from a package."""
LINE, SHARED_LINES = 30, 20
"""A text with more than so many different lines of so many characters that are held out too is not trained on."""


def docstrings(source: str) -> str:
    """All docstrings of a Python file, in order; nothing of a file that is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in texts if text)


def shuffled(paths: Iterator[Path], root: Path) -> list[Path]:
    """In an order that depends on the names alone."""
    return sorted(paths, key=lambda path: sha256(str(path.relative_to(root)).encode()).digest())


def code() -> tuple[list[str], list[str]]:
    """Standard library files to train on, and held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    unwanted = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "lib2to3"}
    kept, held_out, candidates = [], [], 0
    for path in shuffled(root.rglob("*.py"), root):
        if unwanted & set(path.relative_to(root).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.stat().st_size >= HELD_OUT_BYTES:
            candidates += 1
            if candidates % 3 == 0:
                held_out.append(text)
                continue
        kept.append(text)
    return kept, held_out


def packages() -> tuple[list[str], list[str]]:
    """Code and technical prose of installed packages."""
    root = Path(sysconfig.get_paths()["purelib"])
    code_texts, prose_texts, seen = [], [], set()
    for path in shuffled((p for p in root.rglob("*") if p.suffix in (".md", ".rst", ".txt", ".py")), root):
        if "test" in str(path.relative_to(root)) or not path.is_file():
            continue
        whole = path.read_text(encoding="utf-8", errors="replace")
        text = docstrings(whole) if path.suffix == ".py" else whole
        is_prose = len(text) >= PIECE
        if not is_prose:
            text = whole
        digest = sha256(text[:PIECE].encode()).digest()  # the same licence comes with many packages
        if len(text) >= PIECE and digest not in seen:
            seen.add(digest)
            (prose_texts if is_prose else code_texts).append(text)
    return code_texts, prose_texts


def long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= LINE}


def without_copies(texts: list[str], held_out: set[str]) -> list[str]:
    """Those that share few lines with what is held out."""
    return [text for text in texts if len(long_lines(text) & held_out) <= SHARED_LINES]


def tokenize(texts: Any, tokenizer: Any, limit: int | None, what: str) -> np.ndarray:
    """Tokens of texts with an end of text behind each, at most `limit` `[n]` uint16."""
    pieces, total = [], 0
    with tqdm(total=limit, desc=what, unit="token", unit_scale=True) as bar:
        for text in texts:
            ids = [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
            pieces.append(np.array(ids, dtype=np.uint16))
            total += len(ids)
            bar.update(len(ids))
            if limit is not None and total >= limit:
                break
    return np.concatenate(pieces)[:limit]


def documents(texts: list[str], tokenizer: Any, length: int, per_text: int) -> np.ndarray:
    """Whole documents of `length` tokens, at most `per_text` of each text `[n, length]` uint16."""
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found += [ids[i * length : (i + 1) * length] for i in range(min(per_text, len(ids) // length))]
    return np.array(found, dtype=np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder whose tokenizer to use; default: SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, required=True, help="the .npz file to write")
    parser.add_argument(
        "--tokens",
        type=int,
        default=24_000_000,
        help="tokens to train on, at most, and half of them of each kind (%(default)s)",
    )
    parser.add_argument("--held-out-length", type=int, default=8192, help="tokens a held-out document (%(default)s)")
    args = parser.parse_args()
    from pydoc_data.topics import topics

    from spla_backend.evaluate.documents import load_tokenizer
    from spla_backend.models import gguf

    tokenizer = load_tokenizer(args.model or str(gguf.packaged("smollm2")))
    if len(tokenizer) > 1 << 16:
        sys.exit(f"a vocabulary of {len(tokenizer)} tokens does not fit into 16 bits: use another model")
    code_texts, held_out_code = code()
    package_code, prose_texts = packages()
    held_out = long_lines("\n".join([*held_out_code, *topics.values()]))
    half = args.tokens // 2
    arrays = {
        "code": tokenize(without_copies(code_texts + package_code, held_out), tokenizer, half, "code"),
        "prose": tokenize(without_copies(prose_texts, held_out), tokenizer, half, "prose"),
        "held_out_code": documents(held_out_code, tokenizer, args.held_out_length, 2),
        "held_out_prose": documents(["\n\n".join(topics.values())], tokenizer, args.held_out_length, 100),
    }
    np.savez_compressed(args.output, **arrays)
    print(args.output, {name: array.shape for name, array in arrays.items()})


if __name__ == "__main__":
    main()
