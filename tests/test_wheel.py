"""The built wheel works from any folder, without the repository: programs, presets, a rehearsal."""

import os
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from ecp_scale.checkpoint.export import export
from ecp_scale.checkpoint.folder import find_checkpoint
from tests.corpus import ShardedText
from tests.launching import ROOT, environment
from tests.parallel.layouts import Layout, trained


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
    ]
    # Built from a copy: setuptools leaves files beside the sources.
    copy = folder / "source"
    copy.mkdir()
    for name in ("ecp_scale", "ds_configs", "launch", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).symlink_to(ROOT / name)
    subprocess.run([*map(str, words), str(copy)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    (data,) = (folder / "site").glob("*.data/data")  # pip puts it below its prefix
    shared = {path.name for path in (data / "share" / "ecp-scale").rglob("*") if path.is_file()}
    assert shared == {
        "pretrain_ecp.slurm",
        "kubernetes.yaml",
        *(path.name for path in (ROOT / "ds_configs").glob("*.json")),
    }
    return folder / "site"


def run_program(site: Path, name: str, *options: object, folder: Path) -> str:
    """Run a console script as the installed one would, in some folder."""
    points = ConfigParser()
    points.read(next(site.glob("*.dist-info")) / "entry_points.txt")
    module = points["console_scripts"][name].partition(":")[0]
    code = f"import sys; sys.argv[0] = {name!r}; from {module} import main; sys.exit(main())"
    variables = {**environment(), "PYTHONPATH": str(site)}
    words = [sys.executable, "-c", code, *map(str, options)]
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_programs_answer_from_any_folder(site: Path, tmp_path: Path) -> None:
    assert "usage: ecp-preprocess" in run_program(site, "ecp-preprocess", "--help", folder=tmp_path)
    described = run_program(site, "ecp-pretrain", "--config", "scaled-125m", "--dry-run", folder=tmp_path)
    assert described.startswith("architecture        ecp, 12 layers")
    code = "import ecp_scale; print(ecp_scale.__file__)"
    variables = {**os.environ, "PYTHONPATH": str(site)}
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert found.stdout.startswith(str(site))


def test_a_model_is_evaluated(site: Path, sharded_text: ShardedText, tmp_path: Path) -> None:
    export(find_checkpoint(trained(Layout(), sharded_text)), tmp_path / "model")
    (tmp_path / "text.txt").write_text("def main() -> None:\n    return parser.parse_args()\n" * 3)
    said = run_program(site, "ecp-evaluate", "--model", "model", "--data", "text.txt", folder=tmp_path)
    assert "bits_per_byte" in said


def test_a_layout_is_rehearsed(site: Path, tmp_path: Path) -> None:
    words = ("--config", "scaled-125m", "--model.vocab_size=50304", "--gpus", 2, "--parallel.tensor=2", "--rehearse")
    assert "2 steps on 2 ranks" in run_program(site, "ecp-plan", *words, folder=tmp_path)
