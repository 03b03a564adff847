"""What hosts can only find out together: clocks, messages, and who is slow. All ranks call each."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ecp_scale.doctor.findings import Finding, bad, ok
from ecp_scale.parallel.groups import everyone

LARGEST_SKEW = 1.0
"""Seconds between two clocks."""
SLOW = 2.0
"""A device or link is slow that has this part of the median."""
ROUNDS = 3
ROUND_SECONDS = 0.3


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
    ramp = torch.arange(1 << 16, device=device)  # whole numbers, exact for any number of ranks
    numbers = ramp + rank
    dist.all_reduce(numbers)
    right = ramp * ranks + ranks * (ranks - 1) // 2
    wrong = int((numbers != right).sum())
    if any(everyone(wrong)):
        if not wrong:
            return []
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
    # Inside a host only alike pairs compare: some GPUs are joined by a bridge, and others are not.
    kinds: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for one, other in links:
        inside = hosts[one] == hosts[other]
        place = one - hosts.index(hosts[one]) if inside else 0
        kinds.setdefault(("link inside a host" if inside else "link between hosts", place), []).append((one, other))
    found = []
    for (name, _), pairs in kinds.items():
        usual = statistics.median_high(links[pair] for pair in pairs)
        slow = [(a, b) for a, b in pairs if links[a, b] * SLOW <= usual and rank == a]
        found += [bad(name, f"{links[a, b]:.3g} GB/s to rank {b} on {hosts[b]}, median {usual:.3g}") for a, b in slow]
        if not slow and rank == pairs[0][0]:
            found.append(ok(name, f"about {_round(usual)} GB/s each way"))
    return found


def _seconds(action: Callable[[], Any], device: torch.device) -> float:
    _finish(device)
    began = time.perf_counter()
    action()
    _finish(device)
    return time.perf_counter() - began
