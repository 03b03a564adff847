"""Which checkpoints of a run stay, and how the others go."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ecp_scale.checkpoint.folder import PARTIAL, TAG, complete_checkpoints


class Retention(NamedTuple):
    """Which checkpoints of a run stay: the newest ones, and those of every so many steps."""

    keep_last: int | None = None
    """None keeps all."""
    keep_every: int | None = None

    def goes(self, complete: Sequence[Path]) -> list[Path]:
        """Those that go, of the complete checkpoints of a run, oldest first."""
        if self.keep_last is None:
            return []
        older = complete[: -self.keep_last]
        return [folder for folder in older if self.keep_every is None or step_of(folder) % self.keep_every]


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was saved, by the name of its folder."""
    match = TAG.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def remove_old(newest: Path, retention: Retention, in_use: Path | None = None) -> list[OSError]:
    """Remove what cut saves up to the newest checkpoint have left, and what ``retention`` says but for ``in_use``.

    Returns:
        Why some of it could not be removed: each is tried.
    """
    errors: list[OSError] = []

    def attempt(remove_one: Callable[[Path], None], folder: Path) -> None:
        try:
            remove_one(folder)
        except OSError as error:
            errors.append(error)

    for partial in newest.parent.glob(f"step-*{PARTIAL}"):
        name = partial.name.removesuffix(PARTIAL)
        if TAG.fullmatch(name) and name <= newest.name and not partial.is_symlink():
            attempt(shutil.rmtree, partial)
    if retention.keep_last is None:  # No record is read: a run may have hundreds of checkpoints, each with many files.
        return errors
    for folder in retention.goes(removable(newest.parent.parent)):
        if folder != in_use:
            attempt(remove, folder)
    return errors


def removable(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first, without links, which are the user's."""
    return [folder for folder in complete_checkpoints(run) if not folder.is_symlink()]


def remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first: what a kill leaves behind is then no checkpoint."""
    shutil.rmtree(folder.rename(folder.with_name(folder.name + PARTIAL)))
