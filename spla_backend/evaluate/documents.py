"""Token documents of one length, cut from the user's text files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Document:
    """Tokens of a piece of a file.

    Attributes:
        file: Name of the file, as the user gave it.
        tokens: Token ids, those that the tokenizer puts before every text (BOS) included.
    """

    file: str
    tokens: tuple[int, ...]


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model on this machine.

    Raises:
        ValueError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer in {model!r}: {str(error).splitlines()[0]}") from error


def cut_documents(
    files: Sequence[str], tokenizer: Any, length: int, per_file: int | None, skip: int = 0
) -> list[Document]:
    """Documents of exactly `length` tokens, without overlap.

    Args:
        files: Text files in UTF-8.
        tokenizer: A Hugging Face tokenizer.
        length: Tokens a document.
        per_file: Documents a file, spread evenly over it; None takes all that fit, as does a file that has fewer.
        skip: Tokens left out at the beginning of every file.

    Raises:
        ValueError: A file cannot be read as text, or is shorter than one document.
    """
    documents = []
    # What the tokenizer puts before every text, BOS or nothing.
    prefix = list(tokenizer("")["input_ids"])
    body = length - len(prefix)
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {file} as text: {error}") from error
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"][skip:]
        fit = len(tokens) // body
        if fit == 0:
            behind = f" behind the first {skip}" if skip else ""
            raise ValueError(
                f"{file} has {len(tokens)} tokens{behind}, less than one document of {length}: give a longer text or a "
                "smaller --length"
            )
        count = fit if per_file is None else min(fit, per_file)
        for i in range(count):
            start = i * (len(tokens) - body) // max(count - 1, 1)
            documents.append(Document(file, (*prefix, *tokens[start : start + body])))
    return documents
