"""Documents out of text files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ecp_scale.errors import InputError

SUFFIXES = (".txt", ".jsonl")


def find_sources(inputs: Sequence[str]) -> list[Path]:
    """Text files named directly or lying anywhere below a named folder, in sorted order.

    Raises:
        InputError: if an input is missing or of another kind, or there is no text at all.
    """
    sources: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            sources += sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        elif not path.is_file():
            raise InputError(f"input {name}: no such file or folder")
        elif path.suffix not in SUFFIXES:
            raise InputError(f"input {name}: ends in {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")
        else:
            sources.append(path)
    if not any(path.stat().st_size for path in sources):
        raise InputError(f"the corpus is empty: {len(sources)} files with text in {', '.join(inputs) or 'no inputs'}")
    return sources


def read_documents(source: Path, text_key: str) -> Iterator[str]:
    """Documents of one file: the whole of a .txt, or ``text_key`` of every line of a .jsonl. Empty ones are dropped.

    Raises:
        InputError: naming the file, and the line of a .jsonl, where it cannot be read.
    """
    try:
        if source.suffix == ".txt":
            documents: Iterator[str] = iter([source.read_bytes().decode()])
        else:
            documents = _json_lines(source, text_key)
        yield from (text for text in documents if text.strip())
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not valid UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}") from error


def _json_lines(source: Path, text_key: str) -> Iterator[str]:
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode())[text_key]
            except json.JSONDecodeError as error:
                raise InputError(f"{source}, line {number}: not valid JSON ({error})") from error
            except (KeyError, TypeError) as error:
                raise InputError(f"{source}, line {number}: no key {text_key!r}") from error
            if not isinstance(text, str):
                raise InputError(f"{source}, line {number}: {text_key!r} is {type(text).__name__}, expected text")
            yield text
