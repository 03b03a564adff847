"""The whole training command beside a plain loop by segments with the same dropout: python -m benchmarks.command.

Both train a preset with its dropout, clipping and AdamW on one sequence per step, each in processes of its own that
take turns; the first step of each is left out. Memory is the peak of the process (maximum resident set).
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import count
from benchmarks.peers import MaterialisedLanguageModel
from benchmarks.timing import environment
from ecp_scale.command_line import load_preset
from ecp_scale.errors import input_errors_exit
from ecp_scale.option_parser import OptionParser
from ecp_scale.planning.rehearsal import write_text_of_package
from ecp_scale.preparation.preprocessing import preprocess
from ecp_scale.training.metrics import read_metrics

PRESET = "paper-12l"
LOOP = "plain loop by segments, fp32"
ROOT = Path(__file__).resolve().parent.parent


def train_plainly(steps: int, layers: int) -> dict[str, Any]:
    """The loop as one would write it, in fp32; seconds of each step, and the peak of this process in bytes."""
    config = load_preset(PRESET)
    model = MaterialisedLanguageModel(config.model, by_segment=True, dropout=config.model.dropout, layers=layers)
    rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    seconds = []
    for _ in range(steps):
        tokens = torch.randint(config.model.known_vocab_size, (1, config.model.sequence_length + 1))
        began = time.perf_counter()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def train_by_command(folder: Path, precision: str, steps: int, layers: int) -> dict[str, Any]:
    """The command of this package; seconds of each step, and the peak of its process in bytes."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    words = [sys.executable, str(ROOT / "launch/pretrain_ecp.py"), f"--config={PRESET}", f"--model.layers={layers}"]
    words += [f"--data.prefix={folder / 'shards'}", f"--training.output_dir={run}", f"--training.steps={steps}"]
    words += ["--training.global_batch_size=1", f"--training.precision={precision}"]
    words += ["--model.allow_short_receptive_field=true"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    records = read_metrics(run)
    return {
        "seconds": [record["step_seconds"] for record in records],
        "peak_bytes": records[-1]["peak_memory_bytes"],
    }


def compare(rounds: int, steps: int, layers: int) -> dict[str, Any]:
    """Medians over rounds of the seconds of a step and of the peaks, and how many times as fast as the loop we are."""
    plain = [sys.executable, "-m", "benchmarks.command", "--plain", "--steps", str(steps), "--layers", str(layers)]
    found: dict[str, list[dict[str, Any]]] = {
        LOOP: [],
        "command, fp32": [],
        "command, bf16": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        preprocess([str(write_text_of_package(folder))], "byte", str(folder / "shards"))
        for _ in range(rounds):
            done = subprocess.run(plain, capture_output=True, text=True, check=True, cwd=ROOT)
            found[LOOP].append(json.loads(done.stdout))
            for precision in ("fp32", "bf16"):
                found[f"command, {precision}"].append(train_by_command(folder, precision, steps, layers))
    times = {name: [statistics.median(run["seconds"][1:]) for run in runs] for name, runs in found.items()}
    loop = times[LOOP]
    return {
        name: {
            "seconds_per_step": statistics.median(times[name]),
            "times_as_fast_as_the_loop": statistics.median(
                theirs / mine for theirs, mine in zip(loop, times[name], strict=True)
            ),
            "peak_bytes_of_the_process": statistics.median(run["peak_bytes"] for run in runs),
        }
        for name, runs in found.items()
    }


@input_errors_exit()
def main() -> None:
    """Measure and print."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--steps", type=count, default=4, help="of each run (default: 4)")
    parser.add_argument("--layers", type=count, default=load_preset(PRESET).model.layers)
    parser.add_argument("--plain", action="store_true", help="run the loop alone, in this process")
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(train_plainly(options.steps, options.layers)))
        return
    results = compare(options.rounds, options.steps, options.layers)
    print(json.dumps({"environment": environment(), "rounds": options.rounds, "results": results}, indent=1))


if __name__ == "__main__":
    main()
