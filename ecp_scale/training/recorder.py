"""The numbers of each step, and what takes them: metrics.jsonl, the screen, trackers. First rank only."""

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from ecp_scale.checkpoint.saving import Progress
from ecp_scale.config import Config
from ecp_scale.parallel.device import known_peak_teraflops, peak_memory_bytes
from ecp_scale.parallel.groups import Groups
from ecp_scale.training.evidence import Alive
from ecp_scale.training.metrics import MetricsFile, read_metrics
from ecp_scale.training.report import StepReport
from ecp_scale.training.step import StepResult
from ecp_scale.training.trackers import start_trackers


def step_numbers(
    config: Config, groups: Groups, done: Progress, result: StepResult, rate: float, seconds: float, sequences: int
) -> dict[str, Any]:
    """The record of a step, see docs/formats.md.

    Args:
        config: of the run.
        groups: of this rank.
        done: how far the run is after the step.
        result: of the step.
        rate: its learning rate.
        seconds: that it took.
        sequences: of its global batch.
    """
    speed = sequences * config.model.sequence_length / seconds
    training = config.training
    peak = config.logging.peak_teraflops or known_peak_teraflops(groups.device, training.precision, training.tf32)
    ranks = groups.tensor.size() * groups.data.size()
    utilisation = None if peak is None else speed * config.model.flops_per_token / (peak * 1e12 * ranks)
    return {
        "step": done.step,
        "time": time.time(),
        "tokens": done.tokens,
        "loss": result.loss,
        "grad_norm": result.gradient_norm,
        "lr": rate,
        "step_seconds": seconds,
        "tokens_per_second": speed,
        "mfu": utilisation,
        "peak_memory_bytes": peak_memory_bytes(groups.device),
        "skipped_steps": result.skipped_steps,
        "data_digest": f"{done.data_digest:016x}",
    }


class Recorder:
    """Hands the record of each step on."""

    def __init__(self, config: Config, folder: Path, first_step: int) -> None:
        """Open what the config asks for, of a run that continues after ``first_step`` steps."""
        self._folder = folder
        self._file = MetricsFile(folder, first_step)
        self._trackers = start_trackers(config, folder)
        self._alive = Alive(folder, config.training.steps)
        self._report = StepReport(config, folder.name, first_step)

    @property
    def records(self) -> list[dict[str, Any]]:
        """Those of the steps that are done when it is opened."""
        try:
            return read_metrics(self._folder)
        except OSError:  # which the file has said
            return []

    def record(self, numbers: dict[str, Any]) -> None:
        """Take the record of a step."""
        self._file.write(numbers)
        self._report.step(numbers)
        self._alive.step(numbers)
        for tracker in self._trackers:
            tracker.log(numbers)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.finish(failed=error is not None)
        self._report.close()
        self._file.close()
