"""What is read and written around a training run: text to shards, shards to batches, checkpoints.

The text is what every machine with Python has, the sources of its standard library. Checkpoints are compared with plain
copies of their files, which like them are written through the page cache.
"""

import itertools
import json
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import preprocessing
from benchmarks.loader import tokens_per_second
from benchmarks.timing import alternate, medians, ratio
from benchmarks.training import our_engine
from ecp_scale.checkpoint.export import ExportedModel, export
from ecp_scale.checkpoint.folder import checkpoints_folder, tag
from ecp_scale.checkpoint.saving import Progress, Saves
from ecp_scale.config import Config
from ecp_scale.data.blend import Blend
from ecp_scale.parallel.groups import process_groups
from ecp_scale.planning.rehearsal import write_text_of_package
from ecp_scale.preparation.preprocessing import preprocess
from ecp_scale.preparation.tokenizer_training import train_tokenizer

COPIES = 3
VOCABULARY = 8000


@contextmanager
def library_text() -> Iterator[tuple[list[str], str]]:
    """Files of text, and a tokenizer of its own for them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, tokenizer = folder / "text.jsonl", folder / "tokenizer.model"
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*/*.py"))
        text.write_text("".join(json.dumps({"text": file.read_text(errors="replace")}) + "\n" for file in files))
        train_tokenizer([str(text)], str(tokenizer), VOCABULARY, sample_bytes=4 << 20)
        copies = [folder / f"copy-{number}.jsonl" for number in range(COPIES)]
        for copy in copies:
            shutil.copyfile(text, copy)
        yield [str(copy) for copy in copies], f"sentencepiece:{tokenizer}"


def shards(rounds: int) -> dict[str, Any]:
    """Preprocessing as a share of the bare tokenizer's speed on as many cores, and tokens per second of the loader."""
    with library_text() as (text, tokenizer):
        measured = preprocessing.measure(text, tokenizer, rounds)
        with tempfile.TemporaryDirectory() as folder:
            prefix = f"{folder}/x"
            preprocess(text, tokenizer, prefix, workers=preprocessing.WORKERS)
            speeds = {length: {"tokens_per_second": tokens_per_second(prefix, length)} for length in (2048, 8192)}
    return {"preprocessing": measured, **{f"loader, n {length}": speed for length, speed in speeds.items()}}


def checkpoints(config: Config, rounds: int) -> dict[str, Any]:
    """Seconds to save, convert and load a checkpoint of one process, and as multiples of a copy of the same files."""
    with (
        tempfile.TemporaryDirectory() as name,
        process_groups(config.parallel) as groups,
        our_engine(config, groups) as engine,
    ):
        folder = Path(name)
        preprocess([str(write_text_of_package(folder))], "byte", f"{folder}/x")
        blend = Blend([(0, {f"{folder}/x": 1.0})], 64, seed=1)
        # Nothing is written over a checkpoint: each save has a run folder of its own.
        runs, model = (folder / f"run-{number}" for number in itertools.count()), folder / "model"
        saved = checkpoints_folder(folder / "run-0") / tag(1)

        def save() -> None:
            saves = Saves(engine, config, blend, next(runs))
            saves.begin(Progress(1))
            saves.finish()

        calls: dict[str, Callable[[], object]] = {
            "save": save,
            "copy of the checkpoint": lambda: shutil.copytree(saved, folder / "copy", dirs_exist_ok=True),
            "convert": lambda: export(saved, model),
            "copy of the model": lambda: shutil.copyfile(model / "model.safetensors", folder / "copy.safetensors"),
            "load": lambda: ExportedModel.open(model).load(),
        }
        seconds = alternate(calls, rounds)
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in (saved, model)}
    copies = {"save": "copy of the checkpoint", "convert": "copy of the model", "load": "copy of the model"}
    times = {name: {"times_a_copy": ratio(seconds, name, copy)} for name, copy in copies.items()}
    found = {name: {"seconds": middle, **times.get(name, {})} for name, middle in medians(seconds).items()}
    found["save"]["bytes"], found["convert"]["bytes"] = float(sizes[saved]), float(sizes[model])
    return found
