"""The cells of a comparison: what each trains, how it is trained and watched, and what figures come of it."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal, TypeAlias

from ecp_scale.command_line import to_yaml
from ecp_scale.commands.side_by_side import free_port, gpu_of_thread
from ecp_scale.config import Config
from ecp_scale.console import say
from ecp_scale.errors import InputError
from ecp_scale.evaluation.comparison import Cell, Protocol
from ecp_scale.files import write_text
from ecp_scale.training.events import read_events
from ecp_scale.training.metrics import read_metrics

Budget: TypeAlias = Literal["tokens", "flops", "seconds"]
"""What all architectures of one size get as much of as the first one."""
PROTOCOL: Protocol = "sliding"
TRIAL_STEPS = 12
"""Steps by which the speed of an architecture is measured, of which the first half does not count."""
REPORT_SECONDS = 30.0
"""Seconds between two lines about a cell that trains."""


@dataclass(frozen=True)
class Plan:
    """One cell: an architecture at a point of the grid (empty without one) with a seed, and its whole config."""

    architecture: str
    point: str
    seed: int
    config: Config
    vocabulary: int
    """Entries that the model will have."""

    @property
    def name(self) -> str:
        """Name of its run, its model and its file of figures."""
        return "-".join(filter(None, (self.architecture, self.point, f"seed{self.seed}")))

    @property
    def tokens(self) -> int:
        """Tokens of its training."""
        return self.config.tokens_after(self.config.training.steps)

    @property
    def flops(self) -> float:
        """Floating-point operations of its training."""
        model = dataclasses.replace(self.config.model, vocab_size=self.vocabulary)
        return model.flops_per_token * self.tokens

    @property
    def run(self) -> Path:
        """Folder of its run."""
        return Path(str(self.config.training.output_dir))

    @property
    def share_done(self) -> float:
        """Share of its steps that its run has done, by its records."""
        records = read_metrics(self.run)
        return (records[-1]["step"] if records else 0) / self.config.training.steps

    def in_folder(self, folder: Path, steps: int | None = None) -> "Plan":
        """The same with its run in ``folder``, and of another number of steps."""
        training = dataclasses.replace(
            self.config.training,
            output_dir=str(folder / self.name),
            steps=steps or self.config.training.steps,
            tokens=None if steps else self.config.training.tokens,
        )
        return dataclasses.replace(self, config=dataclasses.replace(self.config, training=training))


@dataclass(frozen=True)
class Launch:
    """How cells are trained: ranks of each, cells at a time, and the DeepSpeed JSON."""

    ranks: int
    jobs: int
    deepspeed_path: str | None

    @property
    def threads_per_rank(self) -> int:
        """All cores, shared by the ranks, unless the environment says otherwise."""
        share = max(1, (os.cpu_count() or 1) // (self.ranks * self.jobs))
        return int(os.environ.get("OMP_NUM_THREADS", share))


class Watch:
    """Says how far cells are, and when all will be done."""

    def __init__(self, plans: Sequence[Plan], total: int) -> None:
        self._numbers = {plan.name: total - len(plans) + number for number, plan in enumerate(plans, start=1)}
        self._work = {plan.name: plan.flops for plan in plans}
        self._total = total
        # Work of earlier lives says nothing of the speed.
        self._before = {plan.name: self._work[plan.name] * plan.share_done for plan in plans}
        self._done = dict(self._before)
        self._began = monotonic()
        self._lock = threading.Lock()

    def tell(self, plan: Plan, record: dict[str, Any]) -> None:
        """One line about a cell that trains, from its newest record."""
        steps = plan.config.training.steps
        with self._lock:
            self._done[plan.name] = self._work[plan.name] * record["step"] / steps
            rate = (sum(self._done.values()) - sum(self._before.values())) / (monotonic() - self._began)
            left = (sum(self._work.values()) - sum(self._done.values())) / max(rate, 1e-9)
        say(
            f"[{self._numbers[plan.name]}/{self._total}] {plan.name}: step {record['step']:,} of {steps:,}, "
            f"loss {record['loss'] or float('nan'):.3f}; all cells done in about {duration(left)}"
        )

    def finished(self, plan: Plan, figure: str) -> None:
        """One line about a cell that is done."""
        with self._lock:
            self._done[plan.name] = self._work[plan.name]
        print(f"[{self._numbers[plan.name]}/{self._total}] {plan.name}: {figure}", flush=True)


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def budgeted(plans: Sequence[Plan], budget: Budget, launch: Launch, folder: Path) -> list[Plan]:
    """The same cells, each with as many steps as the first architecture's budget at its point of the grid gives it."""
    if budget == "tokens":
        return list(plans)
    costs: dict[tuple[str, str], float] = {}
    for plan in plans:
        place = (plan.architecture, plan.point)
        if place not in costs:
            costs[place] = plan.flops / plan.tokens if budget == "flops" else _trial_seconds(plan, launch, folder)
    found, problems = [], []
    for plan in plans:
        first = next(other for other in plans if other.point == plan.point)
        ratio = costs[first.architecture, first.point] / costs[plan.architecture, plan.point]
        steps = plan.config.steps_to(max(1, round(first.tokens * ratio)))
        found.append(plan.in_folder(folder / "runs", steps))
        problems += [f"{plan.name}, of {steps} steps: {text}" for text in found[-1].config.problems(launch.ranks)]
    if problems:
        raise InputError("the budget does not fit every cell:\n" + "\n".join(f"  - {text}" for text in problems))
    return found


def _trial_seconds(plan: Plan, launch: Launch, folder: Path) -> float:
    """Seconds of a token, measured once by a short run of its own."""
    trial = plan.in_folder(folder / "trials", TRIAL_STEPS)
    # No warm-up or cool-down fits into it, nor matters.
    optimizer = dataclasses.replace(trial.config.optimizer, schedule="constant", warmup_tokens=0, decay_tokens=None)
    trial = dataclasses.replace(trial, config=dataclasses.replace(trial.config, optimizer=optimizer))
    path = folder / "trials" / f"{trial.name}.json"
    if not path.exists():
        say(f"measuring the speed of {trial.name}")
        train(trial, launch)
        seconds = [record["step_seconds"] for record in read_metrics(trial.run)][TRIAL_STEPS // 2 :]
        write_text(path, json.dumps({"step_seconds": statistics.median(seconds)}) + "\n")
    return float(json.loads(path.read_text())["step_seconds"]) / plan.config.tokens_per_step


class FailedCellError(InputError):
    """The training of a cell failed, as one with too high a rate does; the others may go on. ``why`` in a line."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


def _last_words(log: Path) -> str:
    """The last line of a run, but for those of its launcher."""
    lines = [line for line in log.read_text().splitlines() if line.strip() and "exits with return code" not in line]
    return lines[-1] if lines else "it said nothing"


def train(
    plan: Plan,
    launch: Launch,
    tell: Callable[[dict[str, Any]], None] = lambda record: None,
    stop: threading.Event | None = None,
) -> None:
    """Run ecp-pretrain on a cell's config.

    Args:
        plan: the cell.
        launch: how.
        tell: is given the newest record now and then.
        stop: where it is set, the run is told to save and stop.

    Raises:
        FailedCellError: with the end of its output, if it fails.
        InputError: if it is stopped.
    """
    run = plan.run
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "cell.yaml", to_yaml(plan.config))
    launcher: list[object] = [sys.executable, "-m"]
    if launch.ranks > 1:
        launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", launch.ranks]
        launcher += ["--master_port", free_port(), "--module"]
    words = [*launcher, "ecp_scale.commands.pretrain", "--config", run / "cell.yaml", "--resume", "auto"]
    if launch.deepspeed_path:
        words += ["--deepspeed_config", launch.deepspeed_path]
    environment = {
        "OMP_NUM_THREADS": str(launch.threads_per_rank),
        **os.environ,
        **gpu_of_thread(launch.ranks, launch.jobs),
    }
    told = monotonic()
    with (run / "output.log").open("a") as log:
        process = subprocess.Popen([str(word) for word in words], stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                sleep(0.2)
                if stop is not None and stop.is_set():
                    raise InputError(f"{run.name}: is stopped; the same command goes on there")
                if monotonic() - told > REPORT_SECONDS:
                    told = monotonic()
                    for record in read_metrics(plan.run)[-1:]:
                        tell(record)
        except BaseException:
            process.terminate()  # it saves, and the same command goes on there
            process.wait()
            raise
    if process.returncode:
        newest = read_events(run)[-1:]
        why = newest[0]["error"] if newest and newest[0]["event"] == "failed" else _last_words(run / "output.log")
        tail = "".join((run / "output.log").read_text().splitlines(True)[-20:])
        said = f"{run / 'output.log'} ends with\n{tail}"
        text = f"{run.name}: training ended with {process.returncode}; {said}"
        # Input that is refused is so for other cells, too.
        raise InputError(text) if process.returncode == 2 else FailedCellError(text, why)
    if plan.share_done < 1:  # a signal, or a file `stop`
        raise InputError(f"{run.name}: was stopped before its end; the same command goes on there")


def evaluate(plan: Plan, folder: Path, test: str, task: str | None) -> Cell:
    """Export a trained cell, score the test text, its labels, or the probes of ``task``, and read its metrics."""
    from ecp_scale.checkpoint.export import ExportedModel, export
    from ecp_scale.checkpoint.folder import find_checkpoint
    from ecp_scale.parallel.device import local_device

    export(find_checkpoint(plan.run), folder / "models" / plan.name)
    exported = ExportedModel.open(folder / "models" / plan.name)
    model = exported.load(device=local_device(0))
    figures: dict[str, Any]
    if task is not None:
        from ecp_scale.evaluation.probing import accuracies, check_length, read_probes

        probes = read_probes(Path(task))
        check_length(Path(task), probes, exported.tokenizer, exported.config.sequence_length)
        found = accuracies(model, exported.tokenizer, probes)
        figures = {"protocol": probes[0].task, "accuracy": [[one.distance, one.share] for one in found]}
    elif exported.config.task == "classification":
        from ecp_scale.data.corpus import Corpus
        from ecp_scale.evaluation.classification import check_labels, classify

        corpus = Corpus(test, exported.config.sequence_length)
        check_labels(corpus)
        figures = {"protocol": "classification", "label_accuracy": classify(model, corpus).accuracy}
    else:
        from ecp_scale.evaluation import perplexity
        from ecp_scale.evaluation.texts import read_text

        text = read_text(test, exported.tokenizer)
        result = perplexity.evaluate(model, text, exported.tokenizer.end_of_document, PROTOCOL)
        names = ("protocol", "token_perplexity", "word_perplexity", "bits_per_byte")
        figures = {name: getattr(result, name) for name in names}
    records = read_metrics(plan.run)
    return Cell(
        architecture=plan.architecture,
        point=plan.point,
        seed=plan.seed,
        parameters=exported.config.parameters,
        flops_per_token=exported.config.flops_per_token,
        trained_positions=exported.config.geometry.trained_positions,
        receptive_field=exported.config.receptive_field_tokens,
        tokens=records[-1]["tokens"],
        tokens_per_second=statistics.median(record["tokens_per_second"] for record in records),
        peak_memory_bytes=max(record["peak_memory_bytes"] for record in records),
        curve=[[r["tokens"], r["validation_loss"]] for r in records if "validation_loss" in r],
        **figures,
    )
