"""What a run says on the screen: what it is, how it goes, how it ended. First rank only."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ecp_scale.checkpoint.resuming import Start
from ecp_scale.checkpoint.saving import Progress
from ecp_scale.config import Config
from ecp_scale.config.renames import renamed_fields
from ecp_scale.console import counted, say, terminal
from ecp_scale.data.blend import Blend

PLACES = {("training", "output_dir"), ("data", "prefix"), ("model", "preset")}
"""Fields that say where something is, or what others come from."""


def describe_run(config: Config, blend: Blend, hosts: Sequence[str], zero_stage: int, run_tokens: int) -> str:
    """Model, layout, data, length and precision of a run, a line each.

    Args:
        config: of the run.
        blend: its data.
        hosts: that of every rank.
        zero_stage: of the DeepSpeed JSON.
        run_tokens: tokens of the whole run.
    """
    model, parallel, training = config.model, config.parallel, config.training
    names = list(dict.fromkeys(hosts))
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    replicas = parallel.data_parallel_size(len(hosts))
    lines = {
        "model": [
            f"{model.architecture}, {model.layers} layers, width {model.width}, {model.parameters:,} parameters",
            f"{model.vocab_size:,} entries, sequences of {model.sequence_length:,}",
        ],
        "layout": [
            f"{counted(len(hosts), 'rank')} on {counted(len(names), 'host')} ({shown}): tensor {parallel.tensor}",
            f"context {parallel.context}, data {replicas}, ZeRO-{zero_stage}, {training.precision}",
        ],
        "data": [blend.describe(run_tokens)],
        "run": [
            f"{training.steps:,} steps, {run_tokens:,} tokens, {training.global_batch_size} sequences a step",
            f"saved every {config.checkpoint.every_steps:,} steps",
        ],
    }
    return "\n".join(f"{name:12}{', '.join(parts)}" for name, parts in lines.items())


def describe_start(start: Start, run: Path, config: Config) -> list[str]:
    """Where a run begins, what it passes by, and what a resume changes."""
    lines = [f"passed by   {text}" for text in start.passed_by]
    ranges = ", ".join(f"{first:,} to {last:,}" for first, last in sorted((start.skip_samples or {}).items()))
    lines += [f"samples     passed over are {ranges} (training.skip_samples)"] if ranges else []
    if start.folder is None:
        return [*lines, f"start       fresh, in {run}"]
    done = start.progress
    lines.append(f"start       resumed from {start.folder}: step {done.step:,}, {done.tokens:,} tokens")
    return [*lines, *(f"changed     {text}" for text in changes(run, start, config))]


def changes(run: Path, start: Start, config: Config) -> list[str]:
    """Fields whose values are others than those of a checkpoint, as YAML has them.

    Of what a checkpoint does not record it is the run folder's last config that is compared, if there is one.
    """
    assert start.record is not None
    try:
        before = yaml.safe_load((run / "config.yaml").read_text())
        before = {section: renamed_fields(section, values) for section, values in before.items()}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        before = {}
    before |= {section: getattr(start.record, section) or {} for section in ("model", "attention", "optimizer")}
    before, now = (json.loads(json.dumps(one, default=str)) for one in (before, dataclasses.asdict(config)))
    return [
        f"{section}.{name} was {_as_yaml(before[section][name])} and is now {_as_yaml(value)}"
        for section, fields in now.items()
        for name, value in fields.items()
        if name in before.get(section, {}) and before[section][name] != value and (section, name) not in PLACES
    ]


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class StepReport:
    """How a run goes: a bar where standard error is a terminal, else a line every so many steps."""

    def __init__(self, config: Config, name: str, first_step: int) -> None:
        self._steps = config.training.steps
        self._every = config.logging.every_steps
        self._first = first_step
        self._began = time.monotonic()
        self._bar = None
        if terminal().isatty():
            self._bar = tqdm(total=self._steps, initial=first_step, unit="step", desc=name, file=terminal())

    def close(self) -> None:
        """The end of the bar."""
        if self._bar is not None:
            self._bar.close()

    def step(self, record: dict[str, Any]) -> None:
        """Show the record of a step."""
        step = record["step"]
        if self._bar is not None:
            shown = {
                "loss": f"{record['loss']:.3f}",
                "lr": f"{record['lr']:.2g}",
                "norm": f"{record['grad_norm']:.2g}",
                "tokens/s": f"{record['tokens_per_second']:,.0f}",
                "GB": f"{record['peak_memory_bytes'] / 1e9:.1f}",
                **({} if record["mfu"] is None else {"mfu": f"{record['mfu']:.2f}"}),
            }
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
            if validation := _validation(record):
                say(f"step {step:,}{validation}")
        elif step % self._every == 0 or step in (self._first + 1, self._steps) or _validation(record):
            say(self._line(record))

    def _line(self, record: dict[str, Any]) -> str:
        done = record["step"] - self._first
        left = (time.monotonic() - self._began) / done * (self._steps - record["step"])
        use = "" if record["mfu"] is None else f"  mfu {record['mfu']:.3f}"
        return (
            f"step {record['step']:,}/{self._steps:,}  loss {record['loss']:.4f}{_validation(record)}  "
            f"lr {record['lr']:.3g}  norm {record['grad_norm']:.3g}  {record['tokens_per_second']:,.0f} tokens/s{use}  "
            f"memory {record['peak_memory_bytes'] / 1e9:.2f} GB  {_duration(left)} left"
        )


def _validation(record: dict[str, Any]) -> str:
    """The losses of the corpora that are set aside; nothing where the step was not validated."""
    told = []
    for key, value in record.items():
        what, _, name = key.partition("/")
        if what in ("validation_loss", "validation_accuracy"):
            told.append(f"  {what.replace('_', ' ')}{name and f' ({name})'} {value:.4f}")
    return "".join(told)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe_passed(config: Config, done: Progress) -> str | None:
    """That nothing was to do, where a checkpoint is beyond the length that was asked for."""
    steps, tokens = config.training.steps, config.training.tokens
    wanted = f"training.steps is {steps:,}"
    is_beyond = done.step > steps
    if tokens is not None:
        # The last step of a run may go beyond its tokens, by less than it takes.
        last = config.sequences_after(max(0, done.tokens - 1)) * config.model.sequence_length
        wanted, is_beyond = f"training.tokens is {tokens:,}", done.tokens - last >= tokens
    return f"nothing to do: step {done.step:,} is done, {done.tokens:,} tokens, and {wanted}" if is_beyond else None


def describe_end(run: Path, done: Progress, loss: float | None, reason: str | None, checkpoint: Path | None) -> str:
    """How a run ended: its loss, its checkpoint, and what to do next."""
    last = "" if loss is None else f", loss {loss:.4f}"
    saved = "no checkpoint" if checkpoint is None else f"checkpoint {checkpoint}"
    if reason is not None:
        return (
            f"stopped by {reason} after step {done.step:,}{last}; {saved}\n"
            "next        the same command with --resume auto goes on"
        )
    return (
        f"finished    step {done.step:,}{last}; {saved}\n"
        f"next        ecp-convert --checkpoint {run} --output {run / 'model'}"
    )
