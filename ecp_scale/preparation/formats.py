"""Which files hold text, by their endings, and how they are opened: plain or compressed."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from typing import Any, BinaryIO, Literal

from ecp_scale.errors import InputError

Format = Literal["text", "json", "csv", "parquet"]
FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".tokens": "text",
    ".raw": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
"""Format of each ending, in lower case; those of text, JSON and CSV may be followed by one of ``COMPRESSIONS``."""


def _zst(disk: BinaryIO) -> Any:
    try:
        from backports import zstd
    except ImportError as error:
        raise InputError("files of .zst need `backports.zstd`: pip install 'ecp-scale[data]'") from error
    # Trap: by default frames that were written with a long window (zstd --long=31) are refused.
    return zstd.ZstdFile(disk, options={zstd.DecompressionParameter.window_log_max: 31})


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda disk: gzip.GzipFile(fileobj=disk),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zst,
}
"""How a compressed file is read, by its last ending."""


def compression_of(name: str) -> str:
    """The last ending, if it is that of a compression, else nothing."""
    return next((ending for ending in COMPRESSIONS if name.lower().endswith(ending)), "")


def format_of(name: str) -> Format | None:
    """Format of a file by its name; None for all that is not read."""
    compression = compression_of(name)
    inner = name.lower().removesuffix(compression)
    found = next((kind for ending, kind in FORMATS.items() if inner.endswith(ending)), None)
    return None if found == "parquet" and compression else found


def endings() -> str:
    """All endings, for messages."""
    return f"{', '.join(FORMATS)}; all but .parquet also with {', '.join(COMPRESSIONS)}"
