"""How fast one process reads batches from the page cache: python -m benchmarks.loader --prefix demo/shards/train.

Prints millions of tokens per second for several sequence lengths, digest included; and, given a run, the share of its
median step time that reading the tokens of one of its steps would take.
"""

import json
import statistics
import time
from pathlib import Path

from benchmarks.options import count
from ecp_scale.config import TrainingConfig
from ecp_scale.data.batches import TrainingBatches
from ecp_scale.data.blend import Blend
from ecp_scale.errors import input_errors_exit
from ecp_scale.option_parser import OptionParser
from ecp_scale.training.metrics import read_metrics

SECONDS = 1.0


def tokens_per_second(prefix: str, sequence_length: int) -> float:
    """Speed of reading micro-batches of 4, median of five rounds."""
    blend = Blend([(0, {prefix: 1.0})], sequence_length, seed=1)
    batches = TrainingBatches(blend, TrainingConfig(micro_batch_size=4, global_batch_size=64), ranks=1, rank=0)
    speeds, done = [], 0
    for _ in range(5):
        began, read = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS:
            read += sum(batch[:, 1:].numel() for batch in batches.after(done, 64).micro_batches)
            done += 64 * sequence_length
        speeds.append(read / (time.perf_counter() - began))
    return statistics.median(speeds)


@input_errors_exit()
def main() -> None:
    """Measure and print."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--prefix", required=True, help="prefix of preprocessed shards")
    parser.add_argument("--sequence-lengths", type=count, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--run", help="run folder whose steps to compare with; its sequence length must be among them")
    options = parser.parse_args()
    speeds = {length: tokens_per_second(options.prefix, length) for length in options.sequence_lengths}
    result: dict[str, object] = {"tokens_per_second": speeds}
    if options.run:
        from ecp_scale.command_line import parse

        config = parse(["--config", str(Path(options.run) / "config.yaml"), "--dry-run"], "").config
        step = statistics.median(record["step_seconds"] for record in read_metrics(Path(options.run)))
        reading = config.tokens_per_step / speeds[config.model.sequence_length]
        result |= {"step_seconds": step, "reading_share_of_a_step": reading / step}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
