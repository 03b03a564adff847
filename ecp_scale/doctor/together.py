"""What hosts can only find out together: clocks, a shared folder, messages, and who is slow. All ranks call each."""

import os
import secrets
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ecp_scale.doctor.findings import Finding, bad, note, ok
from ecp_scale.parallel.groups import decided, everyone

LARGEST_SKEW = 1.0
"""Seconds between two clocks."""
SIGHT_SECONDS = 10.0
"""How long a file of one host may take to be seen on another."""
SLOW = 2.0
"""A device or link is slow that has this part of the median."""
ROUNDS = 3
ROUND_SECONDS = 0.3
LEAST_FREE = 10 * 10**9
"""Bytes of a run folder, below which there is room for few checkpoints."""


def clock() -> Finding:
    """How far this host's clock is from that of the first rank, as far as a barrier can tell."""
    apart = []
    for _ in range(ROUNDS):
        dist.barrier()
        now = everyone(time.time())
        apart.append(now[dist.get_rank()] - now[0])
    least = min(apart, key=abs)
    if abs(least) > LARGEST_SKEW:
        return bad("clock", f"{abs(least):,.0f} s {'ahead of' if least > 0 else 'behind'} that of the first rank")
    return ok("clock", f"within {LARGEST_SKEW:g} s of that of the first rank")


def shared_folder(folder: Path) -> list[Finding]:
    """Whether what one host writes, renames and removes there is what the others see, and how fast it reaches the disk.

    Args:
        folder: where runs are to lie; made if it is missing.
    """
    token, rank = decided(lambda: secrets.token_hex(8)), dist.get_rank()
    place, word = folder / f".doctor-{token}", folder / f".doctor-{token}" / "word"
    trouble = _trouble(lambda: _write(place, word, token)) if rank == 0 else None
    trouble = everyone(trouble)[0]
    if trouble is not None:
        return [bad("folder", f"the first rank cannot write there: {trouble}")]
    seen = _within(lambda: word.read_text() == token)
    dist.barrier()
    if rank == 0:
        word.rename(place / "renamed")
    dist.barrier()
    renamed = seen and _within(lambda: (place / "renamed").exists() and not word.exists())
    seconds = 0.0

    def write_own() -> None:
        nonlocal seconds
        began = time.perf_counter()
        with (place / f"rank-{rank}").open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - began

    trouble = _trouble(write_own) if seen else None
    written = {other for other, wrote in enumerate(everyone(seen and trouble is None)) if wrote}

    def lacking() -> set[int]:
        return {other for other in written if not (place / f"rank-{other}").exists()}

    unseen = everyone(lacking() if rank == 0 and not _within(lambda: not lacking()) else set())[0]
    try:
        free = shutil.disk_usage(folder).free if seen else 0
    finally:
        dist.barrier()
        if rank == 0:
            shutil.rmtree(place, ignore_errors=True)
    if not seen:
        return [bad("folder", f"{folder.absolute()} is not the folder that the first rank writes to")]
    if not renamed:
        return [bad("folder", f"{folder.absolute()}: a file that the first rank renames keeps its old name here")]
    if trouble is not None or rank in unseen:
        return [bad("folder", trouble or f"what is written to {folder.absolute()} here, the first rank does not see")]
    speed = ok("folder", "shared by all ranks: written, renamed and seen")
    slow = [note("folder", f"a megabyte takes {seconds:.1f} s to reach the disk")] if seconds > 1 else []
    room = f"{free / 1e9:,.0f} GB free in {folder.absolute()}"
    return [speed, *slow, (ok if free >= LEAST_FREE else note)("free space", room)]


def _write(place: Path, word: Path, token: str) -> None:
    place.mkdir(parents=True)
    word.write_text(token)


def _trouble(action: Callable[[], None]) -> str | None:
    try:
        action()
    except OSError as error:
        return f"{error.filename}: {error.strerror or error}"
    return None


def _within(condition: Callable[[], bool]) -> bool:
    """Whether something becomes true in time; what cannot be read is not."""
    deadline = time.monotonic() + SIGHT_SECONDS
    while True:
        try:
            if condition():
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def arithmetic(device: torch.device) -> list[Finding]:
    """A matrix product and a copy on every device at once; one that is slow beside the others is named."""
    on_gpu = device.type == "cuda"
    n, kind = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    a, b = (torch.ones(n, n, device=device, dtype=kind) for _ in range(2))
    source = torch.ones((1 << 28) if on_gpu else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    products = _rate(lambda: a @ b, device) * 2 * n**3 / 1e12
    copies = _rate(lambda: target.copy_(source), device) * 2 * source.numel() / 1e9
    return [
        _compared("matrix product", products, "TFLOP/s"),
        _compared("memory", copies, "GB/s"),
    ]


def _rate(action: Callable[[], Any], device: torch.device) -> float:
    """How often a second, in the best of some rounds that all ranks begin together."""
    action()
    best = 0.0
    for _ in range(ROUNDS):
        _finish(device)
        dist.barrier()
        began, times = time.perf_counter(), 0
        while time.perf_counter() - began < ROUND_SECONDS:
            action()
            _finish(device)
            times += 1
        best = max(best, times / (time.perf_counter() - began))
    return best


def _round(number: float) -> str:
    """Two digits, without an exponent."""
    return f"{float(f'{number:.2g}'):g}"


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compared(check: str, mine: float, unit: str) -> Finding:
    usual = statistics.median_high(everyone(mine))
    if mine * SLOW <= usual:
        return bad(check, f"{mine:.3g} {unit}, where the median rank has {usual:.3g}")
    return ok(check, f"about {_round(usual)} {unit} on a rank")


def messages(device: torch.device, hosts: list[str]) -> list[Finding]:
    """A sum over all ranks that must be right, its speed, and the speed of the link to the next rank.

    Args:
        device: of this rank.
        hosts: of every rank.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    numbers = torch.arange(1 << 16, device=device, dtype=torch.float32) % 251 + rank
    dist.all_reduce(numbers)
    right = (torch.arange(1 << 16, device=device, dtype=torch.float32) % 251) * ranks + ranks * (ranks - 1) // 2
    wrong = int((numbers != right).sum())
    if wrong:
        return [bad("all-reduce", f"{wrong} of {numbers.numel()} sums over the ranks are wrong here")]
    if ranks == 1:
        return [ok("all-reduce", "one rank has no one to send to")]
    size = (1 << 28) if device.type == "cuda" else (1 << 23)
    x = torch.ones(size // 4, device=device)
    seconds = min(everyone(_seconds(lambda: dist.all_reduce(x), device))[0] for _ in range(ROUNDS))
    bus = 2 * (ranks - 1) / ranks * size / seconds / 1e9
    found = [ok("all-reduce", f"right, {bus:.3g} GB/s from a rank (of {size / 1e6:.0f} MB)")]
    return found + _links(device, hosts, size)


def _links(device: torch.device, hosts: list[str], size: int) -> list[Finding]:
    """Every rank exchanges a message with the next one, half of the pairs at a time."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mine: dict[int, float] = {}
    for parity in (0, 1):
        partner = rank + 1 if rank % 2 == parity else rank - 1
        x, y = torch.ones(size // 4, device=device), torch.empty(size // 4, device=device)

        def exchange(x: torch.Tensor = x, y: torch.Tensor = y, partner: int = partner) -> None:
            both = [dist.P2POp(dist.isend, x, partner), dist.P2POp(dist.irecv, y, partner)]
            for one in dist.batch_isend_irecv(both if rank < partner else both[::-1]):
                one.wait()

        for _ in range(ROUNDS):
            dist.barrier()
            if 0 <= partner < ranks:
                seconds = _seconds(exchange, device)
                mine[partner] = max(mine.get(partner, 0.0), size / seconds / 1e9)
    links = {(one, other): speed for one, of in enumerate(everyone(mine)) for other, speed in of.items() if one < other}
    found = []
    for name, inside in (("link inside a host", True), ("link between hosts", False)):
        speeds = {pair: speed for pair, speed in links.items() if (hosts[pair[0]] == hosts[pair[1]]) == inside}
        if not speeds:
            continue
        usual = statistics.median_high(speeds.values())
        slow = [pair for pair, speed in speeds.items() if speed * SLOW <= usual and rank == pair[0]]
        found += [bad(name, f"{links[a, b]:.3g} GB/s to rank {b} on {hosts[b]}, median {usual:.3g}") for a, b in slow]
        if not slow:
            found.append(ok(name, f"about {_round(usual)} GB/s each way"))
    return found


def _seconds(action: Callable[[], Any], device: torch.device) -> float:
    _finish(device)
    began = time.perf_counter()
    action()
    _finish(device)
    return time.perf_counter() - began
