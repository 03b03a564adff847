"""What all ranks of a launch must have in common before any work begins: config, code, libraries, the run folder."""

import dataclasses
import hashlib
import json
import platform
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

import ecp_scale
from ecp_scale.checkpoint.saving import SIGHT_SECONDS
from ecp_scale.cluster.lock import PATIENCE_SECONDS, Lock
from ecp_scale.command_line import Request
from ecp_scale.console import say
from ecp_scale.errors import AgreedError, InputError
from ecp_scale.parallel.groups import agreed, decided, everyone

MOST_SHOWN = 12


def facts(request: Request) -> dict[str, str]:
    """What decides how this rank trains, by name: fields of the config, keys of the JSON, code, libraries."""
    found = {
        f"{section}.{name}": repr(value)
        for section, values in dataclasses.asdict(request.config).items()
        for name, value in values.items()
    }
    found |= {f"DeepSpeed JSON {key}": json.dumps(value) for key, value in _flat(request.deepspeed)}
    found["--resume"] = str(request.resume)
    found["--init-from"] = str(request.init_from)
    found["code of ecp_scale"] = _code_digest()
    found["Python"] = platform.python_version()
    for package in ("torch", "deepspeed", "megatron-core"):
        found[package] = version(package)
    return found


def _flat(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _code_digest() -> str:
    """Hash of the source of this package."""
    root = Path(ecp_scale.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check_same(mine: dict[str, str]) -> None:
    """Refuse a launch whose ranks differ; all of them take part.

    Raises:
        AgreedError: on all ranks, naming what differs, with ranks and hosts.
    """
    digest = hashlib.sha256(json.dumps(sorted(mine.items())).encode()).hexdigest()
    known = everyone((digest, socket.gethostname()))
    if len({other for other, _ in known}) == 1:
        return
    ranks = {other: [rank for rank, (found, _) in enumerate(known) if found == other] for other, _ in known}
    told = everyone(mine if ranks[digest][0] == dist.get_rank() else {})
    groups = [(told[at[0]], at, sorted({known[rank][1] for rank in at})) for at in ranks.values()]
    names = dict.fromkeys(name for values, _, _ in groups for name in values)
    lines = []
    for name in names:
        if len({values.get(name) for values, _, _ in groups}) > 1:
            found = "; ".join(
                f"{values.get(name, 'nothing')} on rank{'s' if len(at) > 1 else ''} {_few(at)} (host {_few(hosts)})"
                for values, at, hosts in groups
            )
            lines.append(f"  - {name} is {found}")
    more = [f"  - and {len(lines) - MOST_SHOWN} more"] if len(lines) > MOST_SHOWN else []
    raise AgreedError("the ranks of this launch differ:\n" + "\n".join(lines[:MOST_SHOWN] + more))


def _few(items: list[Any]) -> str:
    return ", ".join(map(str, items[:4])) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


@contextmanager
def only_launch(run: Path) -> Iterator[None]:
    """Make the run folder and hold it against other launches; all ranks take part, the first one holds the lock.

    Raises:
        InputError: on all ranks, if it cannot be made, another launch works in it, or not all ranks see the same one.
    """
    lock = Lock(run / ".lock")

    def take() -> str:
        _make(run)
        gone = lock.take(f"training.output_dir {run}", _watching)
        if gone is not None:
            say(f"passed by   the lock of {gone}, which has gone without finishing")
        mark = run / f".launch-{secrets.token_hex(8)}"  # a name that no host can have looked up before
        _writing(run, mark.touch)
        return str(mark)

    try:
        mark = Path(decided(take))
        try:
            agreed(lambda: _check_sight(mark))
        finally:
            mark.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _watching(holder: str) -> None:
    say(f"waiting     up to {PATIENCE_SECONDS:.0f} s to see whether {holder} is at work")


def _make(run: Path) -> None:
    _writing(run, lambda: run.mkdir(parents=True, exist_ok=True))


def _writing(run: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise InputError(f"training.output_dir {run}: {error.strerror or error}") from error


def _check_sight(mark: Path) -> None:
    """Wait until this rank sees what the first one has written."""
    deadline = time.monotonic() + SIGHT_SECONDS
    while not mark.exists():
        if time.monotonic() > deadline:
            raise InputError(
                f"training.output_dir {mark.parent.absolute()} on host {socket.gethostname()} is not the folder that "
                "the first rank writes to; expected one that all hosts share"
            )
        time.sleep(0.1)
