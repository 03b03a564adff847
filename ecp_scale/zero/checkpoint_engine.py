"""How DeepSpeed reads and writes the files of a checkpoint: through ours, see ``ecp_scale.zero.state_files``."""

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ecp_scale.zero.state_files import FileRecord, read_states, write_error, write_states

CLASSES = (LossScaler, ZeroStageEnum, fragment_address)


class CheckpointFiles(CheckpointEngine):
    """What DeepSpeed reads and writes the files of this rank with.

    ``written`` holds what this rank has written since ``create``. Where that fails, ``failure`` says why, and nothing
    is raised: the other ranks wait for this one in DeepSpeed's barriers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.written: dict[str, FileRecord] = {}
        self.failure: str | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin a checkpoint."""
        self.written, self.failure = {}, None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: the folder is there, made by the first rank."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, and wait until it is on disk."""
        if self.failure is not None:
            return
        try:
            self.written[Path(path).name] = write_states(state_dict, Path(path))
        except OSError as error:
            self.failure = write_error(Path(path), error)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file."""
        return read_states(Path(path), map_location, classes=CLASSES)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """End a checkpoint; the record is what counts."""
        return True
