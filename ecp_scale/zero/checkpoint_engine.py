"""How DeepSpeed reads and writes the files of a checkpoint: through ours, see ``ecp_scale.zero.state_files``.

A thread writes. Behind the training, it writes copies: what DeepSpeed hands over are the states themselves, which the
next step changes.
"""

import copy
import errno
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor
from torch.utils._pytree import tree_map

from ecp_scale.zero.state_files import FileRecord, read_states, write_states

CLASSES = (LossScaler, ZeroStageEnum, fragment_address)


class CheckpointFiles(CheckpointEngine):
    """What DeepSpeed reads and writes the files of this rank with.

    Between ``create`` and ``written`` the files are being written; behind the training if ``asynchronous``, else
    ``save`` waits for each. Where that fails nothing is raised before ``written``: the other ranks wait for this one
    in DeepSpeed's barriers.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        super().__init__()
        self.name = type(self).__name__
        self._asynchronous = asynchronous
        self._copies = HostCopies()
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._files: list[Future[tuple[str, FileRecord]]] = []

    @property
    def is_writing(self) -> bool:
        """Whether something is still to be written."""
        return not all(file.done() for file in self._files)

    @property
    def has_failed(self) -> bool:
        """Whether a file could not be written."""
        return any(file.done() and file.exception() is not None for file in self._files)

    def written(self) -> dict[str, FileRecord]:
        """Wait for the files since ``create``, which are on disk then.

        Raises:
            Exception: the first one of a copy or a write.
        """
        wait(self._files)  # all of them: behind one that has failed another may still be at work
        return dict(file.result() for file in self._files)

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin a checkpoint; the one before must have been written."""
        assert not self.is_writing
        self._files = []
        self._copies.begin()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: the folder is there, made by the first rank."""

    def save(self, state_dict: Any, path: str) -> None:
        """Have a file written."""
        try:
            states = self._copies.of(state_dict) if self._asynchronous else state_dict
            self._files.append(self._writer.submit(self._write, states, Path(path)))
        except Exception as error:  # such as no memory for the copy: the other ranks wait in a barrier
            self._files.append(Future())
            self._files[-1].set_exception(error)
        if not self._asynchronous:
            self._files[-1].exception()

    def _write(self, states: Any, path: Path) -> tuple[str, FileRecord]:
        if self.has_failed:
            raise OSError(errno.ECANCELED, "another file could not be written", str(path))
        try:
            return path.name, write_states(states, path)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file."""
        return read_states(Path(path), map_location, classes=CLASSES)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """End a checkpoint; the record is what counts."""
        return True


class HostCopies:
    """Copies of states in host memory, which is used again for the next checkpoint.

    Tensors that share memory share it in the copy, so that files hold it once.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        # With what was copied, whose memory must not become another tensor's meanwhile.
        self._copied: dict[tuple[int, int], tuple[Tensor, Any]] = {}

    def begin(self) -> None:
        """Forget what has been copied; the memory is kept."""
        self._copied = {}

    def of(self, states: Any) -> Any:
        """The same containers with copies of all tensors."""
        _synchronize()
        copied = tree_map(self._leaf, states, is_leaf=lambda node: isinstance(node, torch.Size))
        _synchronize()
        return copied

    def _leaf(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return copy.deepcopy(leaf)
        storage = leaf.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key not in self._copied:
            buffer = self._buffer(len(self._copied), storage.nbytes(), leaf.is_cuda)
            buffer.untyped_storage().copy_(storage, non_blocking=True)
            self._copied[key] = buffer, storage
        view = torch.empty(0, dtype=leaf.dtype)
        view.set_(self._copied[key][0].untyped_storage(), leaf.storage_offset(), leaf.shape, leaf.stride())
        return view

    def _buffer(self, number: int, size: int, pinned: bool) -> Tensor:
        if number == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        before = self._buffers[number]
        if len(before) != size:
            self._buffers[number] = torch.empty(size, dtype=torch.uint8)
            if pinned:
                # Trap: torch's own pinned memory is rounded up to a power of two, up to twice the size.
                cudart = torch.cuda.cudart()
                if len(before):
                    cudart.cudaHostUnregister(before.data_ptr())
                cudart.cudaHostRegister(self._buffers[number].data_ptr(), size, 0)
        return self._buffers[number]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
