"""The speed of this package against named peers: python -m benchmarks.run --suite cpu|gpu [--only attention ...].

Writes OUTPUT/SUITE.json and a table OUTPUT/SUITE.md. Peers are measured in alternating rounds; a ratio is the median
over rounds. Needs the extra "benchmarks"; a suite takes an hour or two. With --toy everything is small, to see that a
suite works, on any machine.
"""

import dataclasses
import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch

from benchmarks import attention, files, generation, launches, training
from benchmarks.options import count
from benchmarks.timing import KEPT, environment
from ecp_scale.config import Config
from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.option_parser import OptionParser


class Measurement(Protocol):
    """Measures in so many alternating rounds."""

    def __call__(self, rounds: int) -> dict[Any, Any]: ...


Suite = dict[str, Measurement]
Precision: TypeAlias = Literal["fp32", "bf16"]

MATERIALISED = (
    "fp32 materialised n x n",
    "fp32 materialised by segment",
    f"fp32 materialised by segment{KEPT}",
)
OTHERS = ("Hugging Face Llama", "Hugging Face GPT-2", "our transformer")
ON_A_GPU = ("bf16 materialised by segment", "bf16 Hugging Face Llama", "bf16 Hugging Face GPT-2", "our transformer")
PAPER_SEQUENCES = 8
"""Of a micro-batch on a GPU, which has done one alone before the host has launched the next kernel."""
SEQUENCES = {"scaled-1b3": 4, "scaled-350m": 8, "scaled-125m": 16}
"""Of a micro-batch, in 80 GB with all states on one rank and attention computed again."""
PERCEIVER = {"tied_key_value": False, "key_value_norm": False}
"""What perceiver-ar-pytorch has of the choices of the preset."""
NARROW = {"layers": 2, "width": 256, "heads": 2, "feed_forward_width": 1024, "vocab_size": 4096}
"""For long sequences: at n 16,384 the scores of n x n take 1 GiB for each head and layer, several times over."""
TOY = {"layers": 2, "width": 64, "heads": 2, "feed_forward_width": 256, "sequence_length": 64, "segment_length": 16}
PEERS = {
    "attention": "local_attention",
    "step fp32, perceiver_ar": "perceiver_ar_pytorch",
    **dict.fromkeys(("step fp32, others", "step bf16", "generation"), "transformers"),
}
"""Libraries of the extra ``benchmarks``, by the measurements that compare with them."""
SMALL_PRESETS = ("scaled-125m", "scaled-350m")


class Sizes:
    """Presets and lengths as they are, or small ones in their place."""

    def __init__(self, toy: bool) -> None:
        self.toy = toy

    def preset(self, name: str, precision: Precision, **changes: Any) -> Config:
        """A preset with changes."""
        config = training.preset(name, precision, **changes)
        if not self.toy:
            return config
        grouped = {"key_value_heads": 1} if config.model.key_value_heads else {}
        latents = {"latents": 32} if config.model.latents else {}
        return training.preset(name, precision, **{**changes, **TOY, **grouped, **latents, "vocab_size": 512})

    def lengths(self, *lengths: int) -> tuple[int, ...]:
        """Sequence lengths."""
        return tuple(length // 32 if self.toy else length for length in lengths)

    def steps(self, peers: tuple[str, ...], name: str, precision: Precision, **changes: Any) -> Measurement:
        """Training steps."""
        return partial(training.compare, self.preset(name, precision, **changes), peers)

    def layers(self, precision: torch.dtype, *lengths: int, full_up_to: int) -> Suite:
        """Attention alone."""
        (segment,) = self.lengths(256)
        return {
            f"attention {str(precision).removeprefix('torch.')}, n {length}": partial(
                attention.compare, length, segment, precision, full=length <= full_up_to
            )
            for length in self.lengths(*lengths)
        }

    def utilisation(self, precision: Precision, names: tuple[str, ...], **changes: Any) -> Suite:
        """Share of the peak."""
        return {
            f"utilisation {name} {precision}": partial(training.utilisation, self.preset(name, precision, **changes))
            for name in names
        }


def cpu(sizes: Sizes) -> Suite:
    """What a machine without a GPU can show."""
    lengths = sizes.lengths(2048, 8192, 65_536, 262_144)
    return {
        "step fp32, materialised": sizes.steps(MATERIALISED, "paper-12l", "fp32"),
        "step fp32, others": sizes.steps(OTHERS, "paper-12l", "fp32"),
        "step bf16, materialised": sizes.steps(MATERIALISED, "paper-12l", "bf16"),
        "step fp32, materialised, n 16384": sizes.steps(
            MATERIALISED, "paper-12l", "fp32", sequence_length=16_384, **NARROW
        ),
        "step fp32, perceiver_ar": sizes.steps(
            ("perceiver-ar-pytorch",), "paper-12l-perceiver-ar", "fp32", feed_forward_width=3072, **PERCEIVER
        ),
        **sizes.layers(torch.float32, 2048, 8192, 32_768, 65_536, full_up_to=32_768),
        **sizes.layers(torch.bfloat16, 8192, full_up_to=0),
        **sizes.utilisation("fp32", ("paper-12l",)),
        **sizes.utilisation("bf16", ("paper-12l",)),
        **sizes.utilisation("fp32", SMALL_PRESETS, layers=4),
        "cost per token": partial(training.cost_per_token, sizes.preset("paper-12l", "fp32", **NARROW), lengths, 1),
        "generation fp32": partial(
            generation.compare, sizes.preset("paper-12l", "fp32"), sizes.lengths(1024, 8192, 65_536), 32
        ),
        "shards": files.shards,
        "checkpoints": partial(files.checkpoints, sizes.preset("paper-12l", "fp32")),
        "ranks": partial(launches.compare, sizes.preset("paper-12l", "fp32", layers=2)),
        "start": launches.start_up,
    }


def gpu(sizes: Sizes) -> Suite:
    """What only a GPU can show."""
    lengths = sizes.lengths(8192, 131_072, 1_048_576)
    long = sizes.preset("scaled-125m", "bf16")
    long = dataclasses.replace(long, parallel=dataclasses.replace(long.parallel, recompute="full"))
    utilisation: Suite = {}
    for name, sequences in SEQUENCES.items():
        utilisation |= sizes.utilisation("bf16", (name,), sequences=sequences, recompute="selective")
    return {
        **utilisation,
        "step bf16": sizes.steps(ON_A_GPU, "paper-12l", "bf16", sequences=PAPER_SEQUENCES),
        "kernels": partial(attention.compare_kernels, *sizes.lengths(131_072, 512)),
        **sizes.layers(torch.bfloat16, 2048, 8192, 32_768, full_up_to=32_768),
        "cost per token": partial(training.cost_per_token, long, lengths, lengths[1]),
        "generation bf16": partial(
            generation.compare, sizes.preset("scaled-350m", "bf16"), sizes.lengths(1024, 8192, 65_536), 32
        ),
    }


SUITES = {"cpu": cpu, "gpu": gpu}


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


@input_errors_exit()
def main() -> None:
    """Measure and write."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="measurements whose name has one of these texts")
    parser.add_argument("--toy", action="store_true", help="small models and lengths, whose figures mean nothing")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/speed; of toys build/toy)")
    options = parser.parse_args()
    output = options.output or Path("build/toy" if options.toy else "benchmarks/results/speed")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file, expected a folder")
    if options.suite == "gpu" and not options.toy and not torch.cuda.is_available():
        raise InputError("--suite gpu needs a GPU, and torch finds none")
    suite = SUITES[options.suite](Sizes(options.toy))
    chosen = {
        name: measure
        for name, measure in suite.items()
        if options.only is None or any(text in name for text in options.only)
    }
    if not chosen:
        raise InputError(f"--only {' '.join(options.only)}: expected texts of {'; '.join(suite)}")
    for peer, library in PEERS.items():
        needed = any(name == peer or name.startswith(f"{peer} ") for name in chosen)
        if needed and importlib.util.find_spec(library) is None:
            raise InputError(f"{library}, a peer of {peer!r}, is not installed; it comes with the extra benchmarks")
    output.mkdir(parents=True, exist_ok=True)
    # What an earlier call found in the same environment stays, so that a suite can be done in parts.
    written = output / f"{options.suite}.json"
    results: dict[str, Any] = {"environment": environment(), "rounds": options.rounds, "measurements": {}}
    if written.exists():
        earlier = json.loads(written.read_text())
        if all(earlier[key] == results[key] for key in ("environment", "rounds")):
            results = earlier
    for name, measure in chosen.items():
        results["measurements"][name] = measure(rounds=options.rounds)
        # After every measurement: the next one may be interrupted.
        written.write_text(json.dumps(results, indent=1) + "\n")
        (output / f"{options.suite}.md").write_text(table(results))
        print(json.dumps({name: results["measurements"][name]}, indent=1), flush=True)


if __name__ == "__main__":
    main()
