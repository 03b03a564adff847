"""What one host can say of itself: libraries, devices, network cards, limits, memory."""

import os
import platform
import resource
import shutil
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from ecp_scale.cluster.ranks import on_one_host
from ecp_scale.doctor.findings import Finding, bad, note, ok

LIBRARIES = ("torch", "deepspeed", "megatron-core", "numpy")
LEAST_FILES = 4096
"""Open files that a rank may need: shards, and the connections to other ranks."""
LEAST_SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm, which NCCL shares between ranks of a host."""
LEAST_LOCKED = 1 << 26
"""Bytes that a process may lock, below which RDMA fails."""
CARDS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
GB = 1e9


def examine_host(backend: str, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """All that needs no other host; ``backend`` is that of the run, gloo or nccl."""
    return [_libraries(), _devices(), *_network(backend, environment), *_limits(), _shared_memory()]


def _libraries() -> Finding:
    """Versions beside what this package asks for."""
    found = {"Python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    try:
        wanted = [Requirement(line) for line in requires("ecp-scale") or []]
    except PackageNotFoundError:
        wanted = []
    outside = [
        f"{one.name} {found[one.name]}, expected {one.specifier}"
        for one in wanted
        if one.name in found and one.marker is None and not one.specifier.contains(found[one.name], prereleases=True)
    ]
    if outside:
        return bad("libraries", "; ".join(outside))
    return ok("libraries", ", ".join(f"{name} {number}" for name, number in found.items()))


def _devices() -> Finding:
    """GPUs, driver and NCCL; or the processor."""
    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            return bad("devices", f"an NVIDIA driver is loaded, but torch {torch.__version__} finds no GPU")
        return ok("devices", f"no GPU, {psutil.cpu_count()} processors")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    counts = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    text = f"{counts}, CUDA {torch.version.cuda}, NCCL {nccl}, driver for CUDA {_driver()}"
    return ok("devices", text) if len(set(names)) == 1 else note("devices", f"{text}: unlike GPUs wait for each other")


def _driver() -> str:
    number = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # the stubs lack it
    return f"{number // 1000}.{number % 1000 // 10}"


def _network(backend: str, environment: Mapping[str, str]) -> list[Finding]:
    """Whether the cards that are asked for are there, and the name of this host leads to it."""
    addresses = {
        name: [one.address for one in of if one.family in (socket.AF_INET, socket.AF_INET6)]
        for name, of in psutil.net_if_addrs().items()
    }
    up = [name for name, state in psutil.net_if_stats().items() if state.isup and addresses.get(name)]
    found = []
    for variable in CARDS:
        wanted = environment.get(variable)
        if not wanted:
            continue
        # NCCL takes beginnings of names, "=" for a whole name and "^" for what is left out; gloo whole names.
        is_nccl = variable.startswith("NCCL")
        words = [word.lstrip("=") for word in wanted.lstrip("^").split(",")]
        left_out = is_nccl and wanted.startswith("^")
        whole = not is_nccl or wanted.startswith("=")
        served = [
            name for name in up if left_out != any(name == word if whole else name.startswith(word) for word in words)
        ]
        lacking = [] if is_nccl else [word for word in words if word not in up]
        if lacking or not served:
            text = f"{variable}={wanted}: no such card is up; this host has {', '.join(sorted(up))}"
            found.append(bad("network cards", text))
        else:
            found.append(ok("network cards", f"{variable}={wanted}"))
    return [*found, _host_name(backend, environment, {one for of in addresses.values() for one in of})]


def _host_name(backend: str, environment: Mapping[str, str], own: set[str]) -> Finding:
    """Whether the name of this host leads to an address that others can reach, as gloo without a card needs."""
    name = socket.gethostname()
    matters = backend == "gloo" and not environment.get("GLOO_SOCKET_IFNAME") and not on_one_host(environment)
    wrong = bad if matters else note
    try:
        found = sorted({str(one[4][0]) for one in socket.getaddrinfo(name, None)})
    except socket.gaierror as error:
        return wrong("host name", f"{name} does not resolve on itself ({error.strerror}); set GLOO_SOCKET_IFNAME")
    if all(address.startswith("127.") or address == "::1" for address in found):
        if not matters:
            return ok("host name", "resolves on itself")
        text = f"{name} resolves to {', '.join(found)} on itself, where other hosts cannot reach it"
        return bad("host name", f"{text}; set GLOO_SOCKET_IFNAME")
    if not set(found) & own:
        return wrong("host name", f"{name} resolves to {', '.join(found)}, which no card of this host has")
    return ok("host name", "leads to a card of the host")


def _limits() -> list[Finding]:
    """Open files, and memory that cards for RDMA lock."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else 1 << 62
    text = f"at most {most:,} open files (ulimit -Hn)" if most < 1 << 62 else "no limit of open files"
    found = [bad("limits", f"{text}, expected {LEAST_FILES:,}") if most < LEAST_FILES else ok("limits", text)]
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY and os.geteuid() != 0:
        verdict = bad if locked < LEAST_LOCKED else note
        found.append(verdict("limits", f"at most {locked:,} bytes of locked memory (ulimit -l), which RDMA uses"))
    return found


def _shared_memory() -> Finding:
    """What ranks of a host share."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return note("shared memory", "/dev/shm is missing")
    free = shutil.disk_usage(path).free
    text = f"{free / GB:.1f} GB free in /dev/shm"
    if free >= LEAST_SHARED_MEMORY:
        return ok("shared memory", "enough in /dev/shm")
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() > 1
    return (bad if on_gpus else note)("shared memory", f"{text}, expected {LEAST_SHARED_MEMORY / GB:.1f}")
