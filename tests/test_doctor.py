"""The doctor: on a good machine, and with planted defects, each of which it must name with its host."""

import re
import subprocess
import time
from pathlib import Path

import pytest

from ecp_scale.doctor.findings import Finding, Placed, bad, has_bad, note, ok, table
from ecp_scale.doctor.host import examine_host
from ecp_scale.doctor.hostfile import examine_hostfile, read_hostfile
from ecp_scale.errors import InputError
from tests.launching import ROOT, environment, run

TIMED = ("matrix product", "memory", "link between hosts", "link inside a host")
"""Checks that compare speeds, on which a busy machine may fail."""


def launch(defect: str, ranks: int, folder: Path) -> "subprocess.CompletedProcess[str]":
    """The doctor on ranks that pretend to be a host each; the second one has the defect."""
    from ecp_scale.planning.rehearsal import torchrun

    words = [*torchrun(ranks), str(ROOT / "tests" / "odd_host.py"), defect, "1", str(ROOT / "launch" / "doctor.py")]
    return subprocess.run(
        [*words, "--folder", "runs"], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )


def rows(text: str, verdict: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"{verdict} ")]


def test_one_host_is_well(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run("launch/doctor.py", "--folder", tmp_path / "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not rows(done.stdout, "bad")
    checks = ("libraries", "devices", "limits", "clock", "folder", "matrix product", "all-reduce", "training")
    assert all(any(line.split()[1] == check.split()[0] for line in rows(done.stdout, "ok")) for check in checks)
    assert "all is well: 1 host" in done.stdout
    assert not (tmp_path / "runs").exists()  # nothing is left behind
    deep = run("launch/doctor.py", "--folder", tmp_path / "no" / "such" / "runs")
    assert "bad   folder              the first rank cannot write there" in deep.stdout
    assert not (tmp_path / "no").exists()
    assert time.monotonic() - began < 120  # a hang, not a speed


def test_hosts_without_a_defect_are_told_no_other_than_their_speed(tmp_path: Path) -> None:
    done = launch("none", 3, tmp_path)
    assert [line for line in rows(done.stdout, "bad") if not any(check in line for check in TIMED)] == []
    assert "link between hosts" in done.stdout
    assert ": 3 hosts" in done.stdout


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        ("card", "network cards       GLOO_SOCKET_IFNAME=eth9: no such card is up; this host has"),
        ("folder", "is not the folder that the first rank writes to  [host1]"),
        ("clock", "clock               7,200 s ahead of that of the first rank  [host1]"),
        ("descriptors", "limits              at most 256 open files (ulimit -Hn), expected 4,096  [host1]"),
        ("slow", ", where the median rank has "),
        ("breaks", "rank 1 of 2 on host host1 stopped with OutOfMemoryError: no memory"),
    ],
)
def test_a_defect_is_named_with_its_host(defect: str, said: str, tmp_path: Path) -> None:
    done = launch(defect, 2, tmp_path)
    assert done.returncode == 1, done.stderr[-2000:]
    found = [line for line in rows(done.stdout, "bad") if said in line]
    assert found, done.stdout + done.stderr[-2000:]
    assert "host1]" in found[0] or defect == "breaks"
    assert not list(tmp_path.rglob(".doctor-*"))
    others = [line for line in rows(done.stdout, "bad") if line not in found]
    assert not [line for line in others if not any(check in line for check in TIMED)]
    assert "Traceback" not in done.stdout
    assert len([line for line in done.stdout.splitlines() if re.search(r"thing.* wrong: |all is well: ", line)]) == 1


def test_a_wrong_card_of_one_rank_alone_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    done = run("launch/doctor.py")
    assert done.returncode == 1
    assert "bad   network cards       GLOO_SOCKET_IFNAME=eth9: no such card is up" in done.stdout
    assert "Traceback" not in done.stderr


def test_the_table_has_a_line_for_each_different_finding() -> None:
    found = [Placed(f"h{number}", ok("disk", "fine")) for number in range(9)]
    assert table(found) == "ok    disk                fine\nall is well: 9 hosts"
    found += [Placed("h9", bad("disk", "full")), Placed("h8", note("card", "slow"))]
    assert has_bad(found)
    assert table(found).splitlines() == [
        "ok    disk                fine  [h0, h1, h2, h3 and 5 more]",
        "bad   disk                full  [h9]",
        "note  card                slow  [h8]",
        "1 thing is wrong: 10 hosts",
    ]


def test_cards_of_nccl_are_beginnings_of_names() -> None:
    def cards(**variables: str) -> list[str]:
        return [one.verdict for one in examine_host("nccl", variables) if one.check == "network cards"]

    assert cards(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo") == ["ok", "ok"]
    assert cards(NCCL_SOCKET_IFNAME="l") == cards(NCCL_SOCKET_IFNAME="=lo") == ["ok"]
    assert cards(NCCL_SOCKET_IFNAME="=l") == cards(GLOO_SOCKET_IFNAME="l") == cards(TP_SOCKET_IFNAME="x") == ["bad"]
    assert cards(NCCL_SOCKET_IFNAME="^docker") == ["ok"]


def test_a_host_whose_name_leads_to_itself_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    several = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}

    def named(backend: str, **variables: str) -> Finding:
        (found,) = [one for one in examine_host(backend, variables) if one.check == "host name"]
        return found

    found = named("gloo", **several)
    assert found.verdict == "bad"
    assert "other hosts cannot reach it; set GLOO_SOCKET_IFNAME" in found.text
    for fine in (
        named("gloo", **several, GLOO_SOCKET_IFNAME="lo"),
        named("nccl", **several),  # which takes a card, and no name
        named("gloo", WORLD_SIZE="2", LOCAL_SIZE="2"),
        named("gloo", WORLD_SIZE="2", SLURM_STEP_NUM_NODES="1"),
    ):
        assert fine.verdict == "ok"
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [(0, 0, 0, "", ("10.99.99.99", 0))])
    assert "10.99.99.99, which no card of this host has" in named("gloo", **several).text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no host, expected lines as node1 slots=8"),
        ("a slots=2\nb\n", "line 2: 'b', expected a line as node1 slots=8"),
        ("a slots=0", "line 1: 'a slots=0', expected"),
        ("a slots=x", "line 1"),
        ("# nodes\na slots=2\na slots=2", "line 3: a is listed twice"),
        ("\xff", "not valid UTF-8 at byte 0"),
    ],
)
def test_a_hostfile_that_is_none_is_refused_by_line(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=said):
        read_hostfile(tmp_path / "hostfile")


def test_hosts_of_a_hostfile_are_looked_up_and_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\ncase "$*" in *127.0.0.2*) echo "Permission denied" >&2; exit 255;; esac\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    hosts = {"localhost": 2, "127.0.0.1": 2, "127.0.0.2": 4, "nowhere.invalid": 2}
    found = {(place, one.check): one for place, one in examine_hostfile(hosts)}
    assert "has the address of localhost" in found["127.0.0.1", "hostfile"].text
    assert found["nowhere.invalid", "hostfile"].text.startswith("does not resolve")
    assert [one.verdict for _, one in examine_hostfile({"nowhere.invalid": 2}, uses_ssh=False)] == ["bad", "ok"]
    assert found["127.0.0.2", "slots"].text == "slots=4; the hosts have 2, 4"
    assert found["127.0.0.2", "ssh"].text == "refused: Permission denied"
    assert found["localhost", "ssh"].verdict == "ok"
    assert found["nowhere.invalid", "hostfile"].verdict == "note"  # an alias of ssh
    (tmp_path / "hostfile").write_text("localhost slots=2\n127.0.0.2 slots=2\n")
    done = run("launch/doctor.py", "--hostfile", tmp_path / "hostfile")
    assert (done.returncode, "bad   ssh" in done.stdout) == (1, True)
    done = run("launch/doctor.py", "--hostfile", tmp_path / "hostfile", "--no-ssh")
    assert (done.returncode, "all is well: 2 hosts" in done.stdout) == (0, True)
    done = run("launch/doctor.py", "--timeout", 0)
    assert (done.returncode, "expected at least 20" in done.stderr) == (2, True)
    done = run("launch/doctor.py", "--hostfile", tmp_path / "hostfile", "--folder", tmp_path)
    assert (done.returncode, "--hostfile looks from the host that launches" in done.stderr) == (2, True)
