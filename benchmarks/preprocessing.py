"""Preprocessing against the bare tokenizer, on the same text and in alternation: python -m benchmarks.preprocessing.

Prints the speed of data_tools/preprocess.py's code with two workers as a share of twice the speed of the tokenizer
alone in one thread, reading from memory; and the largest memory of all its processes together. The start of the workers
counts. ``two_tokenizers`` is the share that two bare tokenizers at once reach on this machine, whose cores share a
clock and caches, and ``against_two`` the speed of preprocessing as a share of theirs.
"""

import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.options import count
from ecp_scale.data.tokenizer import load_tokenizer
from ecp_scale.errors import input_errors_exit
from ecp_scale.option_parser import OptionParser
from ecp_scale.preparation.documents import read_parts
from ecp_scale.preparation.finding import find_sources
from ecp_scale.preparation.parsing import Parsing
from ecp_scale.preparation.preprocessing import preprocess

WORKERS = 2
BATCH = 256


def tokenize_alone(spec: str, parts: list[list[str]]) -> float:
    """Seconds that as many processes take for a part of the texts each; loading them is not counted."""
    with multiprocessing.get_context("spawn").Pool(len(parts)) as pool:
        return max(pool.starmap(_tokenize, [(spec, part) for part in parts], chunksize=1))


def _tokenize(spec: str, texts: list[str]) -> float:
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(spec)
    began = time.perf_counter()
    for first in range(0, len(texts), BATCH):
        tokenizer.encode_batch(texts[first : first + BATCH])
    return time.perf_counter() - began


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Largest sum of the unique memory of this process's children, and of its own growth; one number, at the end."""
    this = psutil.Process()
    before = this.memory_info().rss
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            total = max(0, this.memory_info().rss - before)
            for child in this.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def measure(inputs: list[str], tokenizer: str, rounds: int, memory_only: bool = False) -> dict[str, Any]:
    """What the module says; ``memory_only`` runs preprocessing once, without the peer."""
    sources = find_sources(inputs).sources
    result: dict[str, Any] = {"bytes": sum(source.size for source in sources)}
    alone, together, whole = [], [], []
    texts = [] if memory_only else [text for text, _ in read_parts(sources, Parsing())]
    for _ in range(1 if memory_only else rounds):
        if texts:
            alone.append(tokenize_alone(tokenizer, [texts]))
            together.append(tokenize_alone(tokenizer, [texts[::2], texts[1::2]]))
        with tempfile.TemporaryDirectory() as folder, peak_memory() as peak:
            began = time.perf_counter()
            preprocess(inputs, tokenizer, str(Path(folder) / "x"), workers=WORKERS)
            whole.append(time.perf_counter() - began)
        result["peak_bytes"] = peak[0]
    result["preprocess_seconds"] = statistics.median(whole)
    if alone:
        result["tokenizer_seconds"] = statistics.median(alone)
        pairs = ((one / WORKERS, both, program) for one, both, program in zip(alone, together, whole, strict=True))
        shares = [(ideal / both, ideal / program, both / program) for ideal, both, program in pairs]
        for name, of_rounds in zip(
            ("two_tokenizers", "preprocess", "against_two"), zip(*shares, strict=True), strict=True
        ):
            result[name] = statistics.median(of_rounds)
    return result


@input_errors_exit()
def main() -> None:
    """Measure and print."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--memory-only", action="store_true", help="one run of preprocessing, without the peer")
    options = parser.parse_args()
    measured = measure(options.input, options.tokenizer, options.rounds, options.memory_only)
    print(json.dumps({"tokenizer": options.tokenizer, **measured}, indent=1))


if __name__ == "__main__":
    main()
