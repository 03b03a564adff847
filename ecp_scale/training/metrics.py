"""Where a run's numbers go: metrics.jsonl, the progress bar, Weights & Biases. Rank 0 only."""

import dataclasses
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ecp_scale.config import Config
from ecp_scale.errors import InputError


class MetricsLog:
    """Writes one record per optimizer step; on a resume the records of steps that are done again are dropped."""

    def __init__(self, config: Config, folder: Path, first_step: int) -> None:
        """Open the log of a run that continues after ``first_step`` steps."""
        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= first_step] if first_step else []
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._bar = tqdm(total=config.training.steps, initial=first_step, unit="step", desc=folder.name)
        self._wandb = _start_wandb(config, folder)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append the record of one step."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        shown = {"loss": f"{record['loss']:.3f}", "tokens/s": f"{record['tokens_per_second']:.0f}"}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in record.items() if value is not None}, step=record["step"])


def _lines(path: Path) -> list[str]:
    # A killed run may leave half a line behind.
    return [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []


def _start_wandb(config: Config, folder: Path) -> Any | None:
    if config.logging.wandb == "disabled":
        return None
    import wandb

    name = config.logging.run_name or folder.name
    return wandb.init(
        project=config.logging.wandb_project,
        name=name,
        id=f"{name}-{config.training.seed}",
        resume="allow",
        mode=config.logging.wandb,
        dir=folder,
        config=dataclasses.asdict(config),
    )


def check_wandb(config: Config) -> None:
    """Refuse a run that wants Weights & Biases where it is not installed.

    Raises:
        InputError: naming the extra to install.
    """
    import importlib.util

    if config.logging.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"logging.wandb is {config.logging.wandb} but wandb is missing: pip install 'ecp-scale[wandb]'"
        )
