"""Images to shards for classification: a document is the pixels of one image, row by row, and its label.

Pixels are bytes and labels small numbers, so the tokenizer is that of bytes. Shards, their order, digests and audit are
those of text; every document is one window, whose last token is what a classifier is to predict.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ecp_scale.cluster.lock import only_writer
from ecp_scale.data.manifest import Manifest, SourceRecord, TextCounts, TokenizerRecord, manifest_path
from ecp_scale.data.shards import token_type
from ecp_scale.data.tokenizer import ByteTokenizer
from ecp_scale.errors import InputError
from ecp_scale.files import sha256_of
from ecp_scale.preparation.outputs import shard_name
from ecp_scale.preparation.writing import ShardWriter, publish

Colours: TypeAlias = Literal["grey", "rgb"]
SIDE = 32
"""Pixels of a side of CIFAR's images."""
CHANNELS: dict[Colours, int] = {"grey": 1, "rgb": 3}
MODES: dict[Colours, str] = {"grey": "L", "rgb": "RGB"}
"""Pillow's names; grey is luma, 299/1000 of red, 587/1000 of green and 114/1000 of blue."""
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Of CIFAR-10, where a file does not name its own."""


def write_images(inputs: Sequence[str], prefix: Path, colours: Colours) -> Manifest:
    """Write one shard of parquet files with columns ``img`` and ``label``, and its manifest.

    Args:
        inputs: files, in order.
        prefix: folder and name that every written file begins with.
        colours: a grey value of each pixel, or its red, green and blue.

    Raises:
        InputError: naming the row that is no image of 32 x 32 pixels with a label, or what cannot be read or written.
    """
    files = [Path(name) for name in inputs]
    labels = _labels(files)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with only_writer([prefix]):
            if manifest_path(prefix).exists():
                raise InputError(f"{manifest_path(prefix)} exists already; choose another prefix or remove its files")
            name = shard_name(prefix, 0, 1)
            writer = ShardWriter(name, token_type(ByteTokenizer.vocab_size), TextCounts())
            for pixels, label in _images(files, colours, len(labels)):
                ids = np.concatenate((pixels, [label]))
                writer.add(ids, (1, len(ids), len(pixels), 0, 0, 0))
            record = writer.finish()
            publish(name)
            manifest = Manifest(
                TokenizerRecord(ByteTokenizer.kind, "", ByteTokenizer.sha256, ByteTokenizer.vocab_size, 256),
                (record,),
                record.counts,
                tuple(SourceRecord(str(file), file.stat().st_size, sha256_of(file)) for file in files),
                settings={"images": colours},
                labels=labels,
            )
            manifest.write(prefix)
            return manifest
    except OSError as error:
        raise InputError(f"{error.filename or prefix}: {error.strerror or error}") from error


def _labels(files: Sequence[Path]) -> tuple[str, ...]:
    """Names of the labels, by what the first file says of itself."""
    import pyarrow
    import pyarrow.parquet

    for file in files:
        try:
            if not file.exists():
                raise InputError(f"{file}: no such file")
            schema = pyarrow.parquet.read_schema(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{file}: not a parquet file ({next(iter(str(error).splitlines()), '')})") from error
        missing = {"img", "label"} - set(schema.names)
        if missing:
            raise InputError(f"{file}: columns {', '.join(schema.names)}, expected img and label")
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = described.get("info", {}).get("features", {}).get("label", {}).get("names")
        if names:
            return tuple(map(str, names))
    return LABELS


def _images(files: Sequence[Path], colours: Colours, labels: int) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
    """Pixels (1024 or 3072,) and label of every row."""
    import pyarrow.parquet

    for file in files:
        number = 0
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(columns=["img", "label"]):
                for row in batch.to_pylist():
                    yield _pixels(row["img"], colours, f"{file}, row {number}"), _label(row, labels, file, number)
                    number += 1


def _label(row: dict[str, Any], labels: int, file: Path, number: int) -> int:
    label = row["label"]
    if not isinstance(label, int) or not 0 <= label < labels:
        raise InputError(f"{file}, row {number}: label {label!r}, expected 0 to {labels - 1}")
    return label


def _pixels(image: Any, colours: Colours, where: str) -> npt.NDArray[np.uint8]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise InputError("images need Pillow: pip install 'ecp-scale[data]'") from error
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise InputError(f"{where}: img holds {type(content).__name__}, expected the bytes of an image")
    try:
        with Image.open(io.BytesIO(content)) as opened:
            if opened.size != (SIDE, SIDE) or opened.mode not in ("RGB", "L"):
                size = " x ".join(map(str, opened.size))
                raise InputError(f"{where}: {size} pixels of mode {opened.mode}, expected {SIDE} x {SIDE} of RGB or L")
            return np.asarray(opened.convert(MODES[colours])).reshape(-1)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(f"{where}: not an image that can be read ({error})") from error
