"""Where a run's numbers go: metrics.jsonl, the progress bar, Weights & Biases. Rank 0 only."""

import dataclasses
import importlib.util
import json
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ecp_scale.config import Config
from ecp_scale.data.files import write_text
from ecp_scale.errors import InputError

FILE = "metrics.jsonl"


class MetricsLog:
    """Writes one record per optimizer step; on a resume the records of steps that are done again are dropped."""

    def __init__(self, config: Config, folder: Path, first_step: int) -> None:
        """Open the log of a run that continues after ``first_step`` steps."""
        path = folder / FILE
        kept = [record for record in read_metrics(folder) if record["step"] <= first_step] if first_step else []
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
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


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Records of a run so far, oldest first; none where it has not begun."""
    path = folder / FILE
    lines = path.read_text().splitlines(True) if path.exists() else []
    # A killed run may leave half a line behind.
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _start_wandb(config: Config, folder: Path) -> Any | None:
    if config.logging.wandb == "disabled":
        return None
    import wandb

    # Kept in the run folder, so that a resumed run continues its own record and no other.
    identity = folder / "wandb_id"
    if not identity.exists():
        write_text(identity, uuid.uuid4().hex[:8])
    return wandb.init(
        project=config.logging.wandb_project,
        name=config.logging.run_name or folder.name,
        id=identity.read_text(),
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
    if config.logging.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"logging.wandb is {config.logging.wandb} but wandb is missing: pip install 'ecp-scale[wandb]'"
        )
