"""One corpus out of parts that were preprocessed apart: a manifest of all their shards, which stay where they are."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from ecp_scale.cluster.lock import only_writer
from ecp_scale.data.manifest import Manifest, Skipped, TextCounts, manifest_path
from ecp_scale.errors import InputError
from ecp_scale.files import copy_file


def merge(prefix: Path, parts: Sequence[Path]) -> Manifest:
    """Write PREFIX.manifest.json, whose shards are those of the parts, in their order.

    Raises:
        InputError: if a part is missing, the parts disagree about the tokenizer or its end of documents, or the prefix
            is taken or cannot be written.
    """
    manifests = [Manifest.read(part) for part in parts]
    _check_parts(parts, manifests)
    first = manifests[0].tokenizer
    for part, manifest in zip(parts[1:], manifests[1:], strict=True):
        for what in ("sha256", "end_of_document"):
            found, expected = getattr(manifest.tokenizer, what), getattr(first, what)
            if found != expected:
                raise InputError(f"{part}: {what} of the tokenizer is {found}, but that of {parts[0]} is {expected}")
    for part, manifest in zip(parts, manifests, strict=True):
        if manifest.marked != manifests[0].marked:
            raise InputError(f"{part} and {parts[0]}: one of them marks tokens without a loss, the other does not")
        if manifest.labels != manifests[0].labels:
            raise InputError(f"{part} and {parts[0]}: their documents do not have the same labels")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with only_writer([prefix]):
            if manifest_path(prefix).exists():
                raise InputError(f"{manifest_path(prefix)} exists already; choose another prefix")
            return _merge(prefix, parts, manifests)
    except OSError as error:
        raise InputError(f"{error.filename or prefix}: {error.strerror or error}") from error


def _check_parts(parts: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    paths = [part.resolve() for part in parts]
    twice = [str(part) for number, part in enumerate(parts) if paths[number] in paths[:number]]
    if twice:
        raise InputError(f"{', '.join(twice)}: named twice")
    numbers = [manifest.settings.get("part", [1, 1]) for manifest in manifests]
    count = max(of for _, of in numbers)
    if count > 1 and numbers != [[number, count] for number in range(1, count + 1)]:
        found = ", ".join(f"{part} is {number} of {of}" for part, (number, of) in zip(parts, numbers, strict=True))
        raise InputError(f"expected all {count} parts of a corpus, in order, but {found}")


def _merge(prefix: Path, parts: Sequence[Path], manifests: Sequence[Manifest]) -> Manifest:
    tokenizer = manifests[0].tokenizer
    if tokenizer.file:
        file = f"{prefix.name}.tokenizer{Path(tokenizer.file).suffix}"
        copy_file(parts[0].parent / tokenizer.file, prefix.parent / file)
        tokenizer = dataclasses.replace(tokenizer, file=file)
    shards = tuple(
        dataclasses.replace(record, name=os.path.relpath(part.parent / record.name, prefix.parent))
        for part, manifest in zip(parts, manifests, strict=True)
        for record in manifest.shards
    )
    merged = Manifest(
        tokenizer,
        shards,
        sum((manifest.totals for manifest in manifests), TextCounts()),
        tuple(source for manifest in manifests for source in manifest.sources),
        sum((manifest.skipped for manifest in manifests), Skipped()),
        {"merged": [manifest.settings for manifest in manifests]},
        manifests[0].unread,  # of the same folders, in which each part has looked
        manifests[0].marked,
        manifests[0].labels,
    )
    merged.write(prefix)
    return merged
