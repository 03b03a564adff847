"""Starts of a run with odd fields, JSON keys, folders and environments: python -m tests.training.fuzz --starts 10000.

Each start goes through everything that launch/pretrain_ecp.py does before its model is built, and must either get there
or end as one message with exit code 2.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
import yaml

from ecp_scale.checkpoint.folder import RECORD, checkpoints_folder
from ecp_scale.commands import pretrain
from ecp_scale.config.options import SECTIONS
from ecp_scale.errors import input_errors_exit
from ecp_scale.training import loop
from ecp_scale.zero.json_config import KNOWN, OWNED_BY_RUN_CONFIG, REFUSED
from tests.corpus import write_sharded_text
from tests.launching import ROOT
from tests.parallel.layouts import RECIPE, SETTINGS

FIELDS = [f"{section}.{item.name}" for section, kind in SECTIONS.items() for item in dataclasses.fields(kind)]
ODD: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 64, 10**6, 2**31, 2**63, 2**64, 10**30, 0.5, -0.1, 1e-320, 1e308, 1e400),
    *(float("nan"), float("inf"), True, False, None, "", " ", "auto", "null", "nan", "1e3", "0x10", "1_000", "~", "/"),
    *(
        "/nowhere/at/all",
        "..",
        "-",
        "--",
        "é\u2028\n",
        "\x00",
        "ecp",
        "adamw",
        "bf16",
        [],
        [1],
        [[]],
        {},
        {"a": 1},
        {0: 1},
    ),
    *({0: {}}, {0: {"/nowhere": 1.0}}, "{0: 8}", "[0", "{", "!!python/object:os.system x", "*a", "&a b"),
)
"""Values that a field or key may get."""
FOLDERS: tuple[Any, ...] = ("/proc/nowhere", "/dev/null/x", "a/b/c", " ", ".", "é\u2028\n", "a\x00b", 5, None, [], True)
"""The same of the run folder; nothing that could be written outside of the fuzzer's own folder."""


class ReachedError(Exception):
    """The model would be built now."""


def edited(name: str, draw: random.Random) -> str:
    """A name with a slip of the pen."""
    place = draw.randrange(len(name))
    return draw.choice(
        [name[:place] + name[place + 1 :], name[:place] + draw.choice("az_.") + name[place:], name.upper()]
    )


class Starts:
    """Draws starts and makes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = write_sharded_text(folder / "text")
        self.base = {**SETTINGS["paper"], **RECIPE, "data.prefix": self.text.prefix, "training.steps": 4}

    def words(self, draw: random.Random, run: Path) -> list[str]:
        """Options of one start; files that they name are written."""
        settings: dict[str, Any] = {**self.base, "training.output_dir": str(run)}
        for _ in range(draw.choice([0, 0, 0, 0, 1, 1, 1, 2, 4])):
            field = draw.choice(FIELDS)
            odd = draw.choice(FOLDERS if field == "training.output_dir" else ODD)
            settings[edited(field, draw) if draw.random() < 0.1 else field] = odd
        words = []
        if draw.random() < 0.5:  # as a file
            words += ["--config", self._config_file(settings, draw)]
        else:
            words += [
                f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
            ]
        if draw.random() < 0.5:
            words += ["--deepspeed_config", self._json_file(draw)]
        more = [*[[]] * 8, *[["--resume", "auto"]] * 4, ["--verbose"], ["--resume=maybe"], ["--nonsense"], ["stray"]]
        words += draw.choice(more)
        # An argument of a process cannot hold a NUL.
        return [word.replace("\x00", "\ufffd") for word in words]

    def _config_file(self, settings: dict[str, Any], draw: random.Random) -> str:
        sections: dict[str, Any] = {}
        for key, value in settings.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        if draw.random() < 0.1:
            sections[draw.choice(list(sections))] = draw.choice(ODD)
        path = self.folder / "config.yaml"
        content = yaml.safe_dump(sections).encode()
        if draw.random() < 0.1:
            cut = draw.randrange(len(content))
            content = draw.choice(
                [content[:cut], content[:cut] + b"\xff\x00" + content[cut:], b"", b"[]", b"- a\n b: :"]
            )
        path.write_bytes(content)
        return draw.choice([str(path)] * 12 + [str(self.folder), "/nowhere.yaml", "demo", "", "~/x.yaml"])

    def _json_file(self, draw: random.Random) -> str:
        content: Any = {"zero_optimization": {"stage": draw.choice([0, 1, 2, 3])}}
        for _ in range(draw.choice([0, 1, 1, 2])):
            sections = {key.rpartition(".")[0] for key in KNOWN} - {""}
            key = draw.choice([*KNOWN, *REFUSED, *OWNED_BY_RUN_CONFIG, *sorted(sections), "amp", "elasticity"])
            section = content
            *parents, last = (edited(key, draw) if draw.random() < 0.2 else key).split(".")
            for parent in parents:
                if not isinstance(section.get(parent), dict):
                    section[parent] = {}
                section = section[parent]
            section[last] = draw.choice(ODD)
        path = self.folder / "deepspeed.json"
        text = json.dumps(draw.choice([content] * 10 + [[], "x", None, 3]), default=str)
        data = text.encode() if draw.random() < 0.95 else text.encode()[:-3] + b"\xff"
        path.write_bytes(data)
        return draw.choice([str(path)] * 10 + [str(self.folder), "/nowhere.json"])

    @contextlib.contextmanager
    def odd_run(self, draw: random.Random) -> Iterator[Path]:
        """A run folder that may be there already, in some state."""
        run = self.folder / "run"
        checkpoints = checkpoints_folder(run)
        state = draw.choice(
            ["new"] * 6 + ["file", "torn", "partial", "record", "metrics", "foreign", "link", "no folder"]
        )
        if state == "file":
            run.write_text("not a folder")
        elif state != "new":
            checkpoints.mkdir(parents=True)
        if state in ("torn", "record"):
            (checkpoints / "step-00000002").mkdir()
        if state == "record":
            record = draw.choice(
                [b"", b"{", b"[]", b"null", b'{"format_version": 9}', b'{"format_version": 5}', b"\xff"]
            )
            (checkpoints / "step-00000002" / RECORD).write_bytes(record)
        elif state == "partial":
            (checkpoints / "step-00000002.partial").mkdir()
        elif state == "metrics":
            (run / "metrics.jsonl").write_bytes(
                draw.choice([b"[" * 100_000 + b"\n", b"", b"\x00\n", b"{}\n", b"NaN\n[]\n\n\xff\n", b'{"step": 1'])
            )
        elif state == "foreign":
            (checkpoints / "step-00000005-best").mkdir()
            (checkpoints / "step-00000007").write_text("")
        elif state == "no folder":
            checkpoints.rmdir()
            checkpoints.write_text("")
        elif state == "link":
            (checkpoints / "step-00000002").symlink_to("/nowhere")
        try:
            yield run
        finally:
            shutil.rmtree(run, ignore_errors=True)
            run.unlink(missing_ok=True)

    def environment(self, draw: random.Random) -> dict[str, str]:
        """Variables that a shell or a cluster may have set."""
        odd = {
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "4",
            "WANDB_MODE": draw.choice(["offline", "nonsense"]),
            "SLURM_STEP_NUM_TASKS": draw.choice(["1", "x", ""]),
            "LOCAL_RANK": draw.choice(["0", "x"]),
            "RANK": draw.choice(["0", "-1", ""]),
            "WORLD_SIZE": draw.choice(["1", "0", "x", "2"]),
            "HOME": "/nowhere",
        }
        return {name: odd[name] for name in draw.sample(sorted(odd), draw.choice([0, 0, 0, 0, 1, 2]))}


def start(words: list[str], variables: dict[str, str]) -> tuple[str, str]:
    """How a start ends, "reached", "refused" or what went wrong; and what it said."""
    output = io.StringIO()
    outcome = "returned without a model"
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(sys, "argv", ["pretrain_ecp.py", *words]),
        mock.patch.object(loop, "build_engine", side_effect=ReachedError),
        mock.patch.object(pretrain, "quiet", mock.MagicMock()),
        contextlib.redirect_stderr(output),
        contextlib.redirect_stdout(output),
    ):
        try:
            with input_errors_exit():
                pretrain.main()
        except ReachedError:
            outcome = "reached"
        except SystemExit as error:
            errors = [line for line in output.getvalue().splitlines() if line.startswith("error: ")]
            outcome = "refused" if error.code == 2 and len(errors) == 1 else f"exit code {error.code}"
        except BaseException:
            outcome = "a traceback"
            output.write(traceback.format_exc())
    return outcome, output.getvalue()


def campaign(starts: int, seed: int, folder: Path) -> tuple[Counter[str], list[tuple[list[str], dict[str, str], str]]]:
    """Make some starts; how many ended how, and those that ended wrongly."""
    made = Starts(folder)
    outside = {path: sorted(Path(path).iterdir()) for path in ("/",)}  # elsewhere other tests may write
    os.chdir(folder)
    counts: Counter[str] = Counter()
    wrong = []
    for number in range(starts):
        draw = random.Random(f"{seed} {number}")
        with made.odd_run(draw) as run:
            words, variables = made.words(draw, run), made.environment(draw)
            outcome, said = start(words, variables)
        counts[outcome] += 1
        if outcome not in ("reached", "refused"):
            wrong.append((words, variables, said))
    os.chdir(ROOT)
    for path, names in outside.items():
        assert sorted(Path(path).iterdir()) == names, f"a start has written to {path}"
    return counts, wrong


def main() -> int:
    """Make many starts and print what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    assert not dist.is_initialized()
    with tempfile.TemporaryDirectory() as name:
        counts, wrong = campaign(options.starts, options.seed, Path(name))
    for words, variables, said in wrong[:20]:
        print(words, variables, said[-3000:], sep="\n", end="\n\n")
    print(dict(counts))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
