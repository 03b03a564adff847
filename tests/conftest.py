"""What many tests need: real text, shards of it, a process group of one, launches of several ranks."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.corpus import ShardedText, write_sharded_text
from tests.launching import ROOT
from tests.parallel.layouts import trained

os.environ.setdefault("OMP_NUM_THREADS", "1")
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")
if "ECP_TEST_GPU" not in os.environ:  # `make test-gpu` sets it, for tests/gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Trap: what nohup or a shell's background ignores stays ignored in the programs that tests send signals to.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Spread files over the processes of ``make test``; those that need trained layouts go to one, which trains them.

    Trap: the mark xdist_group does nothing under pytest 9.2 with xdist 3.8.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            if "ECP_TEST_GPU" in os.environ:
                return nodeid
            return trained.__name__ if f"{trained.__name__}(" in (ROOT / file).read_text() else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def sharded_text(tmp_path_factory: pytest.TempPathFactory) -> ShardedText:
    """A small tokenizer and shards of real text."""
    return write_sharded_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def groups() -> Iterator[object]:
    """This process as the only rank; its groups are what models take. Of a module: others train in this process."""
    from ecp_scale.config import ParallelConfig
    from ecp_scale.parallel.groups import process_groups

    with process_groups(ParallelConfig()) as groups:
        yield groups


@pytest.fixture
def golden() -> Path:
    """Golden numbers of the authors' release."""
    return Path(__file__).parent / "golden" / "ecp.safetensors"
