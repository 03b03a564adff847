"""What can be said of a hostfile from the host that starts a launch: names, slots, addresses, ssh."""

import itertools
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ecp_scale.doctor.findings import Finding, Placed, bad, note, ok
from ecp_scale.errors import InputError

LINE = re.compile(r"(?P<host>[^\s=]+)\s+slots=(?P<slots>[1-9]\d*)(?:\s.*)?")
SSH_SECONDS = 5


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, as DeepSpeed reads them: ``node1 slots=8`` in each line.

    Raises:
        InputError: naming the line, or the host that is listed twice.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"--hostfile {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--hostfile {path}: not valid UTF-8 at byte {error.start}") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        if match is None:
            raise InputError(f"--hostfile {path}, line {number}: {line.strip()!r}, expected a line as node1 slots=8")
        if match["host"] in found:
            raise InputError(f"--hostfile {path}, line {number}: {match['host']} is listed twice")
        found[match["host"]] = int(match["slots"])
    if not found:
        raise InputError(f"--hostfile {path}: no host, expected lines as node1 slots=8")
    return found


def examine_hostfile(hosts: dict[str, int], uses_ssh: bool = True) -> list[Placed]:
    """Look every host up and, where several are listed, reach it by ssh as DeepSpeed does."""
    found: list[Placed] = []
    owners: dict[str, str] = {}
    with ThreadPoolExecutor(128) as pool:
        looked_up = list(pool.map(_addresses, hosts))
        reached = list(pool.map(_by_ssh, hosts)) if uses_ssh and len(hosts) > 1 else []
    for host, addresses, reach in itertools.zip_longest(hosts, looked_up, reached):
        twin = next((owners[address] for address in addresses or () if address in owners), None)
        owners |= dict.fromkeys(addresses or (), host)
        if addresses is None and reach is not None and reach.verdict == "ok":
            found.append(Placed(host, note("hostfile", "does not resolve, but ssh knows it; set --master_addr")))
        elif addresses is None:
            found.append(Placed(host, bad("hostfile", "does not resolve")))
        elif twin is not None:
            text = f"has the address of {twin} ({', '.join(addresses)}): two names for one host"
            found.append(Placed(host, bad("hostfile", text)))
        else:
            found.append(Placed(host, ok("hostfile", "resolves")))
    sizes = sorted(set(hosts.values()))
    verdict, text = (ok, f"{sizes[0]} on each host") if len(sizes) == 1 else (bad, "")
    found += [
        Placed(host, verdict("slots", text or f"slots={slots}; the hosts have {', '.join(map(str, sizes))}"))
        for host, slots in hosts.items()
    ]
    return found + [Placed(host, reach) for host, reach in zip(hosts, reached, strict=False)]


def _addresses(host: str) -> list[str] | None:
    """Of a host, with or without a user before it; None where its name does not resolve."""
    try:
        return sorted({str(one[4][0]) for one in socket.getaddrinfo(host.rpartition("@")[2], None)})
    except (socket.gaierror, UnicodeError):
        return None


def _by_ssh(host: str) -> Finding:
    words = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}", host, "true"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=3 * SSH_SECONDS)
    except FileNotFoundError:
        return note("ssh", "ssh is not installed here, which deepspeed --hostfile needs")
    except subprocess.TimeoutExpired:
        return bad("ssh", f"no answer within {3 * SSH_SECONDS} s")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return bad("ssh", f"refused: {reason}")
    return ok("ssh", "answers without a password")
