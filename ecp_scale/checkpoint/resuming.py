"""Find the checkpoint that a run goes on from, and fill a new engine with it.

The first rank chooses the checkpoint: a shared file system may show another host an older state.
"""

import dataclasses
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
import yaml

from ecp_scale.checkpoint.folder import (
    RECORD,
    CheckpointRecord,
    check_writable,
    newest_complete,
    saved_folders,
    set_aside,
)
from ecp_scale.checkpoint.identity import check_continues, identity
from ecp_scale.checkpoint.saving import Progress, layout_of
from ecp_scale.config import Config
from ecp_scale.console import say
from ecp_scale.data.blend import SKIPPED, Blend
from ecp_scale.data.passed_over import PassedOver, union
from ecp_scale.errors import InputError
from ecp_scale.models.parameter_groups import optimizer_order
from ecp_scale.parallel.digests import difference, summed
from ecp_scale.parallel.groups import agreed, decided, gathered
from ecp_scale.zero.digests import held_digests
from ecp_scale.zero.engine import Engine
from ecp_scale.zero.filling import fill, share_weights
from ecp_scale.zero.saved_states import SavedStates
from ecp_scale.zero.state_files import damages, read_states


@dataclass(frozen=True)
class Start:
    """Where a run begins: after a checkpoint, or afresh; and the newer checkpoints that are passed by, with reasons."""

    folder: Path | None = None
    record: CheckpointRecord | None = None
    passed_by: tuple[str, ...] = ()
    elsewhere: Path | None = None
    """The same checkpoint in the mirror."""
    skip_samples: Mapping[int, int] | None = None
    """What the run passes over: what its config says, and what it has chosen itself."""

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        if self.record is None:
            return Progress()
        return Progress(self.record.step, self.record.tokens, int(self.record.data_digest, 16))


def find_start(run: Path, resuming: bool, config: Config) -> Start:
    """Where a run begins that finds ``run`` as it is; for one rank to ask.

    Checkpoints of samples that training.skip_samples passes over are passed by. To these comes what the run itself has
    chosen to pass over when it went back from a spike, which its folder knows, and its checkpoints.

    Args:
        run: its folder.
        resuming: whether it is to go on from a checkpoint that is there.
        config: of the run; its mirror is a second folder with checkpoints, taken where its newest one is newer.

    Raises:
        InputError: if there is a checkpoint, and the run is not to go on from it, or none can be read.
    """
    asked = config.training.skip_samples
    config = with_ranges(config, _ranges_of(run, config) if resuming else {})
    places = {"training.output_dir": run}
    if config.checkpoint.mirror is not None:
        places["checkpoint.mirror"] = Path(config.checkpoint.mirror)
    found: list[tuple[str, str, Path]] = []
    passed: list[str] = []
    for field, folder in places.items():
        newest, incomplete = newest_complete(folder, partial(skipped_by, config))
        passed += incomplete
        if newest is not None:
            found.append((newest.name, field, newest))
    if not found:
        # A folder without a record is of a save that an earlier version was cut short in.
        if any((path / RECORD).exists() for folder in places.values() for path in saved_folders(folder)):
            # Not the first save that was cut short: work that something else has damaged, or that cannot be seen now.
            raise InputError(
                "the run can go on from none of its checkpoints; restore them, move them away to start over, or choose "
                "another folder:\n" + "\n".join(f"  - {text}" for text in passed)
            )
        return Start(passed_by=tuple(passed), skip_samples=asked)
    _, field, chosen = max(found, key=lambda item: item[0])  # the first, where both have it
    if not resuming:
        raise InputError(
            f"{field} {chosen.parent.parent} holds checkpoints; pass --resume auto or choose another folder"
        )
    others = [path for _, _, path in found if path != chosen and path.name == chosen.name]
    record = CheckpointRecord.read(chosen)
    if _same_windows(config, record):
        config = with_ranges(config, dict(record.data.get(SKIPPED, [])))
    elsewhere = others[0] if others else None
    return Start(chosen, record, tuple(passed), elsewhere, config.training.skip_samples)


def _ranges_of(run: Path, config: Config) -> dict[int, int]:
    """What the config in a run folder passes over; nothing where it cannot be read, or has other samples."""
    try:
        found = yaml.safe_load((run / "config.yaml").read_text())
        ranges = found["training"]["skip_samples"]
        same = found["model"]["sequence_length"] == config.model.sequence_length
        return {int(first): int(last) for first, last in ranges.items()} if same else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return {}


def with_ranges(config: Config, ranges: Mapping[int, int] | None) -> Config:
    """The config that passes over some ranges of samples, too."""
    found = union(config.training.skip_samples or {}, ranges or {})
    return dataclasses.replace(config, training=dataclasses.replace(config.training, skip_samples=found or None))


def skipped_by(config: Config, record: CheckpointRecord) -> str | None:
    """Why a run does not go on from a checkpoint whose samples it is to pass over; None where it has read none."""
    if not _same_windows(config, record):
        return None
    before = PassedOver(dict(record.data.get(SKIPPED, [])))
    reached = before.reached(record.tokens // config.model.sequence_length)
    for first, last in PassedOver(config.training.skip_samples).ranges.items():
        if first < reached and not any(start <= first and last <= end for start, end in before.ranges.items()):
            return f"has read samples from {first} to {last}, which training.skip_samples passes over"
    return None


def _same_windows(config: Config, record: CheckpointRecord) -> bool:
    """Whether the samples of a checkpoint are those of the run, and not windows of another length."""
    return bool(record.model.get("sequence_length", config.model.sequence_length) == config.model.sequence_length)


def leave_behind(run: Path, config: Config) -> None:
    """Set checkpoints aside of samples that the run passes over; for one rank, when its config is in its folder.

    They are renamed: else their names would be in the way of those that the run is to save.

    Raises:
        OSError: if one in the run folder cannot be renamed; of the mirror it is said, as all that fails there.
    """
    for folder in saved_folders(run):
        _set_aside(folder, config)
    leave_behind_in_mirror(config)


def leave_behind_in_mirror(config: Config) -> None:
    """The same in the mirror alone."""
    if config.checkpoint.mirror is None:
        return
    try:
        folders = saved_folders(Path(config.checkpoint.mirror))
    except OSError as error:
        say(f"mirror      {error.filename}: {error.strerror}; the run goes on")
        return
    for folder in folders:
        try:
            _set_aside(folder, config)
        except OSError as error:
            say(f"mirror      {error.filename}: {error.strerror}; the run goes on")


def _set_aside(folder: Path, config: Config) -> None:
    with suppress(InputError):
        if skipped_by(config, CheckpointRecord.read(folder)) is not None:
            set_aside(folder, "rolled-back")


def check_sight(run: Path, start: Start) -> None:
    """Refuse a rank that cannot write checkpoints, or sees a newer one than the first rank, which chose ``start``.

    Raises:
        InputError: naming the folder.
        OSError: naming what cannot be written.
    """
    check_writable(run, f".probe-{dist.get_rank()}")
    known = "\n".join(start.passed_by)
    for folder in saved_folders(run):
        newer = start.folder is None or folder.name > start.folder.name
        if newer and folder.name not in known:
            raise InputError(
                f"{folder} is seen on host {socket.gethostname()}, but not by the first rank, which would go on from "
                f"{start.folder or 'nothing'}; start again when the file system shows it on all hosts"
            )


def check_start(start: Start, config: Config, blend: Blend) -> None:
    """Refuse to go on from the checkpoint of another run, see ``check_continues``; for one rank to ask.

    Raises:
        InputError: listing what differs.
    """
    if start.record is not None:
        check_continues(start.record, start.folder, identity(config, blend, start.record.tokens))


def load(engine: Engine, config: Config, start: Start) -> None:
    """Fill a new engine with what a checkpoint of any layout holds; all ranks take part.

    Every file is read from front to end first and compared with its hash: in the same layout by the ranks that go on to
    load it, whose host may have another copy in its cache; else each by one rank.

    Raises:
        InputError: on all ranks, if a file is damaged.
    """
    folder, record = start.folder, start.record
    if folder is None or record is None:
        return
    layout = layout_of(engine, config)
    same = layout == {key: getattr(record, key) for key in layout}
    names = _own_files(engine, record) if same else _share(record)
    agreed(lambda: _check_files(folder, record, names, start.elsewhere), True)
    if same and agreed(lambda: _same_groups(engine, folder)):
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    else:
        order = optimizer_order(engine.module)
        saved = partial(SavedStates, folder, record.files, record.partitions, record.tensor_parallel, order)
        agreed(lambda: fill(engine, saved()), True)
        share_weights(engine)
        engine.global_steps, engine.skipped_steps = record.step, record.skipped_steps
    if record.digests:
        check_digests(engine, record.digests, str(folder))


def check_digests(engine: Engine, expected: Mapping[str, str], source: str) -> None:
    """Refuse weights that are not those whose digests are known; all ranks take part.

    Args:
        engine: which has been filled with them.
        expected: the digest of every parameter.
        source: where the weights come from, for the error.

    Raises:
        InputError: on all ranks, naming the first parameter that differs.
    """
    parts = gathered(held_digests(engine))
    decided(lambda: refuse_difference(summed(list(expected), parts), expected, source))


def refuse_difference(found: Mapping[str, str], expected: Mapping[str, str], source: str) -> None:
    """Raise an InputError that names the first parameter with another digest."""
    differing = difference(found, expected)
    if differing is not None:
        raise InputError(f"{source}: the weights are not those that were saved: {differing}")


def _own_files(engine: Engine, record: CheckpointRecord) -> list[str]:
    """Names of the files that DeepSpeed loads on this rank; the first one looks at those that no rank loads, too."""
    names = [engine._get_ckpt_name("", "")]
    if engine.zero_optimization():
        names.append(engine._get_zero_ckpt_name("", ""))
    missing = [name for name in names if name not in record.files]
    if missing:
        raise InputError(f"the checkpoint lists no file {missing[0]} of rank {dist.get_rank()}")
    others = [name for name in record.files if not name.endswith("_states.pt")] if dist.get_rank() == 0 else []
    return names + others


def _share(record: CheckpointRecord) -> list[str]:
    """A part of the files, so that those of all ranks make up the whole."""
    return sorted(record.files)[dist.get_rank() :: dist.get_world_size()]


def _same_groups(engine: Engine, folder: Path) -> bool:
    """Whether this rank's file cuts the parameters into as many flat tensors: ``sub_group_size`` may have changed."""
    if engine.zero_optimization_stage() != 3:
        return True
    content = read_states(folder / engine._get_zero_ckpt_name("", ""), tensors=False)
    saved = content["optimizer_state_dict"]["fp32_flat_groups"]
    groups = engine.optimizer.fp32_partitioned_groups_flat
    return [flat.shape.numel() for flat in saved] == [flat.numel() for flat in groups]


def _check_files(folder: Path, record: CheckpointRecord, names: list[str], elsewhere: Path | None) -> None:
    """Compare some of the files with their hashes."""
    found = damages(folder, {name: record.files[name] for name in names})
    if found and elsewhere is not None:
        found.append(f"{elsewhere} is another copy: move {folder} away to go on from that")
    if found:
        raise InputError("\n".join(found))
