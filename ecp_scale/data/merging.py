"""One corpus out of parts that were preprocessed apart: a manifest of all their shards, which stay where they are."""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ecp_scale.data.manifest import Manifest, Skipped, TextCounts, manifest_path
from ecp_scale.errors import InputError


def merge(prefix: Path, parts: Sequence[Path]) -> Manifest:
    """Write PREFIX.manifest.json, whose shards are those of the parts, in their order.

    Raises:
        InputError: if a part is missing, the parts disagree about the tokenizer, or the prefix is taken.
    """
    manifests = [Manifest.read(part) for part in parts]
    if manifest_path(prefix).exists():
        raise InputError(f"{manifest_path(prefix)} exists already; choose another prefix")
    for part, manifest in zip(parts[1:], manifests[1:], strict=True):
        if manifest.tokenizer.sha256 != manifests[0].tokenizer.sha256:
            raise InputError(
                f"{part}: tokenizer {manifest.tokenizer.sha256[:12]}..., but that of {parts[0]} is "
                f"{manifests[0].tokenizer.sha256[:12]}..."
            )
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = manifests[0].tokenizer
    if tokenizer.file:
        file = f"{prefix.name}.tokenizer{Path(tokenizer.file).suffix}"
        shutil.copyfile(parts[0].parent / tokenizer.file, prefix.parent / file)
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
    )
    merged.write(prefix)
    return merged
