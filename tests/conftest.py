"""What many tests need: real text, shards of it, a process group of one, launches of several ranks."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.corpus import ShardedText, write_sharded_text
from tests.launching import ROOT
from tests.parallel.layouts import trained

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Spread files over the processes of ``make test``; those that need trained layouts go to one, which trains them.

    Trap: the mark xdist_group does nothing under pytest 9.2 with xdist 3.8.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return trained.__name__ if f"{trained.__name__}(" in (ROOT / file).read_text() else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def sharded_text(tmp_path_factory: pytest.TempPathFactory) -> ShardedText:
    """A small tokenizer and shards of real text."""
    return write_sharded_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def groups() -> Iterator[object]:
    """This process as the only rank; its groups are what models take."""
    from ecp_scale.config import ParallelConfig
    from ecp_scale.parallel.groups import process_groups

    with process_groups(ParallelConfig()) as groups:
        yield groups


@pytest.fixture
def golden() -> Path:
    """Golden numbers of the authors' release."""
    return Path(__file__).parent / "golden" / "ecp.safetensors"
