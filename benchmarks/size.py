"""What it takes to start, save, resume and convert at size: python -m benchmarks.size --output FOLDER.

One rank's part of a preset is really made, saved, loaded and read on this machine, in a launch whose other ranks are
played: the rank does all that it would do but send. What it took per element or byte is the rate by which the table
says what every preset takes in its layout, on disks and processors like these. Measured and computed figures are kept
apart: the table has computed ones alone.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from benchmarks.options import count
from benchmarks.timing import environment
from ecp_scale.checkpoint.folder import find_checkpoint
from ecp_scale.checkpoint.weights_file import write_weights
from ecp_scale.command_line import parse
from ecp_scale.config import Config
from ecp_scale.errors import input_errors_exit
from ecp_scale.option_parser import OptionParser
from ecp_scale.parallel.groups import process_groups
from ecp_scale.parallel.partition import Share
from ecp_scale.precision import weight_type
from ecp_scale.zero import json_config
from ecp_scale.zero.checkpoint_engine import CheckpointFiles
from ecp_scale.zero.engine import build_engine
from ecp_scale.zero.filling import begin_states
from ecp_scale.zero.saved_states import STEP, WEIGHT, ParameterStates
from ecp_scale.zero.state_files import FileRecord, SavedTensor, read_states

GIB = 1 << 30
VOCABULARY = 32_000


class Layout(NamedTuple):
    """A preset on so many ranks, under a ZeRO stage."""

    preset: str
    ranks: int
    stage: int


LAYOUTS = (
    Layout("scaled-125m", 8, 1),
    Layout("scaled-350m", 16, 1),
    Layout("scaled-1b3", 32, 1),
    Layout("scaled-6b7", 64, 1),
    Layout("scaled-13b", 128, 2),
    Layout("scaled-30b", 256, 2),
    Layout("scaled-70b", 512, 2),
)
"""As docs/scaling.md plans them."""
MEASURED = Layout("scaled-1b3", 32, 1)


def config_of(preset: str) -> Config:
    """The run of a preset, with a vocabulary."""
    return parse([f"--config={preset}", f"--model.vocab_size={VOCABULARY}", "--dry-run"], "").config


def peak_bytes() -> int:
    """Of this process so far, resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _AdamStates:
    """States of a run with AdamW after a step, as ``begin_states`` asks for them."""

    def keys(self, name: str) -> list[str]:
        """Which there are."""
        return [WEIGHT, STEP, "exp_avg", "exp_avg_sq"]

    def read(self, name: str, share: Share, start: int, stop: int, keys: Sequence[str]) -> ParameterStates:
        """The number of steps."""
        return {STEP: torch.tensor(1.0)}


def one_rank(layout: Layout) -> dict[str, float]:
    """Start, save, copy, load and read the part of the first rank; seconds, bytes and peaks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = config_of(layout.preset)
    request = parse([f"--config={layout.preset}", "--dry-run", f"--deepspeed_config=zero{layout.stage}"], "")
    found: dict[str, float] = {}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.ranks)

    def timed(name: str, action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = action()
        found[f"{name}_seconds"] = time.perf_counter() - began
        found[f"{name}_peak_bytes"] = peak_bytes() - before
        return result

    with process_groups(config.parallel) as groups, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = json_config.resolve(request.deepspeed, config, layout.ranks)
        before = peak_bytes()
        engine = timed("start", lambda: build_engine(config, settings, groups))
        found["elements"] = sum(parameter.numel() for parameter in engine.module.parameters())
        begin_states(engine, _AdamStates())
        files: CheckpointFiles = engine.checkpoint_engine
        (folder / "saved").mkdir()
        timed("save", lambda: engine.save_checkpoint(str(folder), tag="saved", save_latest=False))
        paths = [path for path in (folder / "saved").iterdir() if path.name in files.written()]
        found["saved_bytes"] = sum(path.stat().st_size for path in paths)
        engine.checkpoint_engine = CheckpointFiles(asynchronous=True)
        for _ in range(2):  # the second time the memory is there
            (folder / "copied").mkdir()
            timed("copy", lambda: engine.save_checkpoint(str(folder), tag="copied", save_latest=False))
            engine.checkpoint_engine.written()
            shutil.rmtree(folder / "copied")
        copied = folder / "plain"
        copied.mkdir()
        timed("cp", lambda: _copy_and_sync(paths, copied))
        shutil.rmtree(copied)
        timed("hash", lambda: [FileRecord.of(path) for path in paths])
        timed("load", lambda: engine.load_checkpoint(str(folder), tag="saved"))
        engine.destroy()
        timed("read", lambda: _read_all(paths))
    dist.destroy_process_group()
    return found


def _copy_and_sync(sources: list[Path], folder: Path) -> None:
    subprocess.run(["cp", *sources, folder], check=True)
    subprocess.run(["sync", *(folder / source.name for source in sources)], check=True)


def _read_all(paths: list[Path]) -> None:
    """Read all tensors of some files, as a rank of another layout reads what it holds."""
    for path in paths:
        leaves = tree_leaves(read_states(path, tensors=False), is_leaf=lambda node: isinstance(node, SavedTensor))
        for saved in leaves:
            if isinstance(saved, SavedTensor):
                saved.read(torch.empty(saved.shape, dtype=saved.dtype))


def conversion(bytes_of_weights: int) -> dict[str, float]:
    """Write weights as a conversion does, from a file that holds them; seconds, and those of a plain copy."""
    elements = bytes_of_weights // 4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save({"flat": torch.zeros(elements)}, folder / "flat.pt")
        flat = read_states(folder / "flat.pt", tensors=False)["flat"]

        def read(name: str, start: int, stop: int) -> torch.Tensor:
            out = torch.empty(stop - start)
            flat.read(out, start)
            return out

        began = time.perf_counter()
        write_weights(folder, {"flat": [elements]}, read)
        seconds = time.perf_counter() - began
        began = time.perf_counter()
        (folder / "copy").mkdir()
        _copy_and_sync([folder / "flat.pt"], folder / "copy")
        return {
            "bytes": bytes_of_weights,
            "seconds": seconds,
            "copy_seconds": time.perf_counter() - began,
        }


def real_conversion(checkpoint: Path) -> dict[str, float]:
    """Convert a checkpoint as users do, beside a copy of the weights that come of it; in a process of its own."""
    find_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory(dir=checkpoint) as name:
        folder = Path(name)
        words = [sys.executable, "launch/convert_checkpoint.py"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        began = time.perf_counter()
        subprocess.run([*words, f"--checkpoint={checkpoint}", f"--output={folder / 'model'}"], check=True)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        assert peak > before, "another process of this benchmark had a larger peak"
        weights = sorted((folder / "model").glob("model*.safetensors"))
        (folder / "copy").mkdir()
        began = time.perf_counter()
        _copy_and_sync(weights, folder / "copy")
        return {
            "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.rglob("*_states.pt")),
            "weights_bytes": sum(path.stat().st_size for path in weights),
            "seconds": seconds,
            "copy_seconds": time.perf_counter() - began,
            "peak_bytes": peak * 1024,
        }


def saved_bytes(layout: Layout) -> float:
    """What the first of the ranks that hold the same parameters saves, which also writes the forward pass's weights."""
    config = config_of(layout.preset)
    elements = config.model.parameters / config.parallel.tensor
    return 12 * elements * config.parallel.tensor / layout.ranks + weight_type(config).itemsize * elements


def row(layout: Layout, rates: dict[str, float]) -> dict[str, float | str]:
    """What a preset takes in its layout, per rank; the conversion is one process for all."""
    config = config_of(layout.preset)
    elements = config.model.parameters / config.parallel.tensor
    replicas = layout.ranks // config.parallel.tensor
    weight = weight_type(config).itemsize
    saved = saved_bytes(layout)
    return {
        "preset": layout.preset,
        "layout": f"{layout.ranks} ranks, tensor {config.parallel.tensor}, ZeRO-{layout.stage}",
        "start, s": elements * rates["start_seconds_per_element"],
        "start, GiB": 2 * weight * elements / GIB,
        "checkpoint, GiB": config.model.parameters * (12 + weight) / GIB,
        "save, s": saved * rates["save_seconds_per_byte"],
        "copy, s": saved * rates["copy_seconds_per_byte"],
        "load, s": saved * (rates["load_seconds_per_byte"] + rates["hash_seconds_per_byte"]),
        "read, s": 12 * elements / replicas * rates["read_seconds_per_byte"],
        "convert, min": config.model.parameters * 4 * rates["convert_seconds_per_byte"] / 60,
    }


def rates_of(rank: dict[str, float], converted: dict[str, float]) -> dict[str, float]:
    """Seconds per element or byte."""
    rates = {
        f"{name}_seconds_per_byte": rank[f"{name}_seconds"] / rank["saved_bytes"] for name in ("save", "copy", "load")
    }
    rates["hash_seconds_per_byte"] = rank["hash_seconds"] / rank["saved_bytes"]
    rates["read_seconds_per_byte"] = rank["read_seconds"] / rank["saved_bytes"]
    rates["start_seconds_per_element"] = rank["start_seconds"] / rank["elements"]
    rates["convert_seconds_per_byte"] = converted["seconds"] / converted["bytes"]
    return rates


@input_errors_exit()
def main() -> None:
    """Measure, compute and write."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for size.json and size.md")
    parser.add_argument("--preset", default=MEASURED.preset, help="whose part is made here (default: %(default)s)")
    parser.add_argument("--ranks", type=count, default=MEASURED.ranks, help="of its launch (default: %(default)s)")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=MEASURED.stage, help="of ZeRO")
    parser.add_argument("--convert-bytes", type=count, default=2 * GIB, help="of weights (default: 2 GiB)")
    parser.add_argument("--checkpoint", type=Path, help="only convert this run's, for real, and print what it took")
    parser.add_argument("--one-rank", action="store_true", help="only measure, in this process")
    options = parser.parse_args()
    if options.one_rank:
        print(json.dumps(one_rank(Layout(options.preset, options.ranks, options.stage))))
        return
    if options.checkpoint is not None:
        print(json.dumps(real_conversion(options.checkpoint), indent=1))
        return
    words = [sys.executable, "-m", "benchmarks.size", "--one-rank", f"--preset={options.preset}"]
    words += [f"--ranks={options.ranks}", f"--stage={options.stage}"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    rank = json.loads(done.stdout.splitlines()[-1])
    converted = conversion(options.convert_bytes)
    rates = rates_of(rank, converted)
    rows = [row(layout, rates) for layout in LAYOUTS]
    result = {
        "environment": environment(),
        "measured": {"preset": options.preset, "ranks": options.ranks, "stage": options.stage, **rank},
        "conversion": converted,
        "rates": rates,
        "computed": rows,
    }
    text = as_table(rows)
    print(json.dumps(result, indent=1), text, sep="\n")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "size.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.output / "size.md").write_text(text)


def as_table(rows: list[dict[str, float | str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for values in rows:
        cells = [value if isinstance(value, str) else f"{value:.3g}" for value in values.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
