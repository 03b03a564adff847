"""The speed of this package against named peers: python -m benchmarks.run --suite cpu [--only attention ...].

Writes OUTPUT/SUITE.json and a table OUTPUT/SUITE.md. Peers are measured in the same process, in alternating rounds; a
ratio is the median over rounds. Needs the extra "benchmarks"; a suite takes from minutes to an hour.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention, files, generation, launches, training
from benchmarks.timing import environment
from ecp_scale.errors import InputError, input_errors_exit

Measurement = Callable[[int], dict[Any, Any]]


def _steps(preset: str, precision: str, *peers: str, **changes: Any) -> Measurement:
    return lambda rounds: training.compare(training.preset(preset, precision=precision, **changes), rounds, peers)


def _utilisation(preset: str, precision: str, **changes: Any) -> Measurement:
    return lambda rounds: training.utilisation(training.preset(preset, precision=precision, **changes), rounds)


def _cost_per_token(preset: str, precision: str, lengths: tuple[int, ...], **changes: Any) -> Measurement:
    return lambda rounds: training.cost_per_token(
        training.preset(preset, precision=precision, **changes), lengths, rounds
    )


def _generation(preset: str, precision: str, contexts: tuple[int, ...]) -> Measurement:
    return lambda rounds: generation.compare(training.preset(preset, precision=precision), contexts, 32, rounds)


def _layer(length: int, dtype: torch.dtype, full: bool) -> Measurement:
    return lambda rounds: attention.compare(length, 256, dtype, rounds, full)


MATERIALISED = (
    "fp32 materialised n x n",
    "fp32 materialised by segment",
    f"fp32 materialised by segment{training.KEPT}",
)
ALL_PEERS = (*MATERIALISED, "Hugging Face Llama", "Hugging Face GPT-2", "our transformer")
PERCEIVER = {"tied_key_value": False, "key_value_norm": False, "feed_forward_width": 3072}
"""What perceiver-ar-pytorch has of the choices of the preset."""
NARROW = {"layers": 2, "width": 256, "heads": 2, "feed_forward_width": 1024, "vocab_size": 4096}
LONG = {
    "sequence_length": 16_384,
    "segment_length": 256,
    "layers": 2,
    "width": 384,
    "heads": 3,
    "feed_forward_width": 1536,
}
"""Narrow, since one layer's scores of n x n take 1 GiB per head, several times over."""
SMALL_PRESETS = ("scaled-125m", "scaled-350m")
SUITES: dict[str, dict[str, Measurement]] = {
    "cpu": {
        "step fp32": _steps("paper-12l", "fp32", *ALL_PEERS),
        "step bf16": _steps("paper-12l", "bf16", *MATERIALISED),
        "step fp32, n 16384, 2 layers, width 384": _steps("paper-12l", "fp32", *MATERIALISED, **LONG),
        "step perceiver_ar fp32": _steps("paper-12l-perceiver-ar", "fp32", "perceiver-ar-pytorch", **PERCEIVER),
        **{f"attention fp32, n {n}": _layer(n, torch.float32, n <= 32_768) for n in (2048, 8192, 32_768, 65_536)},
        "attention bf16, n 8192": _layer(8192, torch.bfloat16, False),
        "utilisation paper-12l fp32": _utilisation("paper-12l", "fp32"),
        "utilisation paper-12l bf16": _utilisation("paper-12l", "bf16"),
        **{f"utilisation {name} fp32, 4 layers": _utilisation(name, "fp32", layers=4) for name in SMALL_PRESETS},
        "cost per token": _cost_per_token("paper-12l", "fp32", (2048, 8192, 65_536, 262_144), **NARROW),
        "generation fp32": _generation("paper-12l", "fp32", (1024, 8192, 65_536)),
        "shards": files.shards,
        "checkpoints": lambda rounds: files.checkpoints(training.preset("paper-12l"), rounds),
        "ranks": lambda rounds: launches.compare(["--config=paper-12l", "--model.layers=2"], rounds),
        "start": launches.start_up,
    },
    "gpu": {
        "step bf16": _steps("paper-12l", "bf16", *ALL_PEERS),
        **{f"attention bf16, n {n}": _layer(n, torch.bfloat16, True) for n in (2048, 8192, 32_768)},
        **{f"utilisation {name} bf16": _utilisation(name, "bf16") for name in (*SMALL_PRESETS, "scaled-1b3")},
        "cost per token": _cost_per_token("scaled-350m", "bf16", (8192, 131_072, 1_048_576)),
        "generation bf16": _generation("scaled-350m", "bf16", (1024, 8192, 65_536)),
    },
}
"""What each suite measures, by name."""


def table(results: dict[str, Any]) -> str:
    """The results as markdown, a row for each number."""
    lines = ["| measurement | | |", "|---|---|---|"]
    for name, result in results["measurements"].items():
        for row, value in result.items():
            numbers = value if isinstance(value, dict) else {"": value}
            text = ", ".join(f"{key.replace('_', ' ')} {number:.4g}".strip() for key, number in numbers.items())
            lines.append(f"| {name} | {str(row).replace('_', ' ')} | {text} |")
    setting = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    return f"{setting}; {results['rounds']} rounds\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="measurements whose name has one of these words")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed"))
    options = parser.parse_args()
    if options.suite == "gpu" and not torch.cuda.is_available():
        raise InputError("--suite gpu needs a GPU, and torch finds none")
    chosen = {
        name: measure
        for name, measure in SUITES[options.suite].items()
        if options.only is None or any(word in name for word in options.only)
    }
    if not chosen:
        raise InputError(f"--only {' '.join(options.only)}: expected words of {'; '.join(SUITES[options.suite])}")
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": environment(), "rounds": options.rounds, "measurements": {}}
    for name, measure in chosen.items():
        results["measurements"][name] = measure(options.rounds)
        # After every measurement: the next one may be interrupted.
        (options.output / f"{options.suite}.json").write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({name: results["measurements"][name]}, indent=1), flush=True)
    (options.output / f"{options.suite}.md").write_text(table(results))


if __name__ == "__main__":
    with input_errors_exit():
        main()
