"""A launch of which a rank (1, or ODD_RANK) is odd, as another host may be: tests/training/odd_rank.py WHAT [options].

``config``: it has another learning rate. ``code``: its package has other sources. ``folder``: a relative run folder
is another. ``stale``: it does not see the newest checkpoint. ``hidden``: it cannot read the files of checkpoints.
``cache``: it reads other bytes of its own file of the optimizer. ``shards``: it sees other shards under the prefix.
``full``: it cannot write its share of a checkpoint, as where its disk is full. ``slow``: it begins to write after
seconds. ``hung``: its second forward pass of all does not end, as a kernel that hangs.
"""

import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

from ecp_scale import errors
from ecp_scale.checkpoint import folder, resuming
from ecp_scale.checkpoint.saving import SaveFailedError
from ecp_scale.command_line import parse
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.training import agreement, corpora, loop
from ecp_scale.training.step import DivergedError
from ecp_scale.zero import checkpoint_engine
from ecp_scale.zero.state_files import FileRecord


def make_odd(what: str, options: list[str]) -> None:
    """Change what this process sees or does."""
    if what == "config":
        options += ["--optimizer.learning_rate=0.123", "--training.seed=7"]
    elif what == "code":
        agreement._code_digest = lambda: "f" * 16
    elif what == "folder":
        os.chdir(os.environ["OTHER_FOLDER"])
    elif what == "stale":
        seen = folder.saved_folders
        folder.saved_folders = resuming.saved_folders = lambda run: seen(run)[:-1]
    elif what in ("hidden", "cache"):
        problem = FileRecord.problem
        reason = "cannot be read (No such file or directory)" if what == "hidden" else "is damaged"
        is_odd = "" if what == "hidden" else "zero_pp_rank_1_"

        def other(record: FileRecord, path: Path) -> str | None:
            return reason if is_odd in path.name else problem(record, path)

        FileRecord.problem = other  # type: ignore[assignment, method-assign]
    elif what == "shards":
        opened = corpora.Corpus.__init__

        def open_other(corpus: corpora.Corpus, prefix: str, sequence_length: int) -> None:
            opened(corpus, prefix, sequence_length)
            corpus.__dict__["digest"] = "0" * 64

        corpora.Corpus.__init__ = open_other  # type: ignore[method-assign, assignment]
        os.environ["LOCAL_RANK"] = "0"  # of its own host
    elif what == "hung":
        forward, calls = LanguageModel.forward, itertools.count(1)

        def hang(*arguments: Any, **named: Any) -> Any:
            if next(calls) == 2:
                time.sleep(1000)
            return forward(*arguments, **named)

        LanguageModel.forward = hang  # type: ignore[method-assign]
    elif what == "slow":
        write = checkpoint_engine.write_states

        def wait(states: object, path: Path) -> FileRecord:
            time.sleep(1.5)
            return write(states, path)

        checkpoint_engine.write_states = wait
    elif what == "full":

        def fail(states: object, path: Path) -> FileRecord:
            raise OSError(28, "No space left on device", str(path))

        checkpoint_engine.write_states = fail


def main() -> None:
    """Train."""
    what, *options = sys.argv[1:]
    if os.environ["RANK"] == os.environ.get("ODD_RANK", "1"):
        make_odd(what, options)
    try:
        loop.train(parse(options, ""))
    except (DivergedError, SaveFailedError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    with errors.input_errors_exit():
        main()
