"""What README and docs say is true: commands parse, Python runs, files exist, generated pages are current."""

import re
import runpy
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest

from ecp_scale.checkpoint.export import export
from ecp_scale.checkpoint.folder import find_checkpoint
from ecp_scale.command_line import parse
from tests.corpus import ShardedText
from tests.launching import ROOT, run
from tests.parallel.layouts import Layout, trained

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED_FILE = re.compile(r"(?:launch|data_tools|tests|ds_configs|benchmarks)/[\w./]+\.(?:py|json|slurm)\b")
PACKAGES = (
    "attention|checkpoint|cluster|commands|config|data|evaluation|models|parallel|planning|preparation|training|zero"
)
NAMED_MODULE = re.compile(rf"`((?:{PACKAGES})/\w+\.py)`")
PROGRAM = re.compile(r"(?:launch|data_tools)/\w+\.py|(?<![\w-])ecp-[a-z-]+(?= --)")


def blocks(language: str) -> list[tuple[Path, str]]:
    """Code blocks of a language, with their pages."""
    return [
        (page, block)
        for page in PAGES
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)
    ]


def commands() -> list[tuple[Path, str]]:
    """Lines of shell, with their pages; those that end in a backslash joined."""
    return [
        (page, line.partition(" #")[0].strip())
        for page, block in blocks("bash")
        for line in block.replace("\\\n", " ").splitlines()
        if PROGRAM.search(line)
    ]


@cache
def help_of(program: str) -> str:
    """What a program's --help prints; of a console script that of the script in launch/ or data_tools/."""
    if program.startswith("ecp-"):
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        module = scripts[program].partition(":")[0]
        programs = [*ROOT.glob("launch/*.py"), *ROOT.glob("data_tools/*.py")]
        script = next(path for path in programs if f"from {module} import" in path.read_text())
        program = str(script.relative_to(ROOT))
    done = run(program, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def name_of(value: object) -> str | None:
    """Page of a parametrized test."""
    return value.name if isinstance(value, Path) else None


@pytest.mark.parametrize(("page", "line"), commands(), ids=name_of)
def test_commands_take_the_options_that_are_shown(
    page: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    match = PROGRAM.search(line)
    assert match is not None
    program, options = match[0], line[match.end() :]
    if program.endswith("pretrain_ecp.py"):
        (tmp_path / "run.yaml").write_text("model: {preset: demo}\n")
        (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
        monkeypatch.chdir(tmp_path)
        parse([*shlex.split(options), "--dry-run"], "")
        return
    fields = ("--model.", "--data.", "--training.", "--parallel.", "--optimizer.", "--config", "--deepspeed_config")
    for option in re.findall(r"(?<!\S)--[\w.-]+", options):
        assert option in help_of(program) or option.startswith(fields), f"{page.name}: {program} has no {option}"


def test_yaml_blocks_are_configs(tmp_path: Path) -> None:
    found = blocks("yaml")
    assert found
    for _, block in found:
        (tmp_path / "run.yaml").write_text(block)
        parse(["--config", str(tmp_path / "run.yaml"), "--dry-run"], "")


@pytest.fixture(scope="module")
def model_folder(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples read: model/ and book.txt."""
    folder = tmp_path_factory.mktemp("docs")
    export(find_checkpoint(trained(Layout(), sharded_text)), folder / "model")
    (folder / "book.txt").write_text("def main() -> None:\n    return parser.parse_args()\n" * 3)
    return folder


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=name_of)
def test_python_of_the_pages_runs(
    page: Path, code: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model_folder)
    exec(compile(code, str(page), "exec"), {})


def test_files_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        for program in set(NAMED_FILE.findall(text)):
            assert (ROOT / program).is_file() or "results" in program, f"{page.name}: {program}"
        for link in set(re.findall(r"\]\((?!http)([^)#]+)\)", text)):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for target in set(re.findall(r"`make ([a-z-]+)`", text)):
            assert target in targets, f"{page.name}: make {target}"
        for module in set(NAMED_MODULE.findall(text)):
            assert (ROOT / "ecp_scale" / module).is_file(), f"{page.name}: {module}"
    tree = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert tree is not None
    for line in tree.group(1).splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def test_the_readme_is_short_and_every_page_is_in_the_index() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 150
    index = (ROOT / "docs" / "index.md").read_text()
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name
        assert page.name in navigation, page.name


def test_the_configuration_page_is_what_the_dataclasses_say() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "configuration.py"))["page"]
    assert (ROOT / "docs" / "configuration.md").read_text() == page(), "run python docs/configuration.py"


def test_a_machine_with_a_gpu_keeps_its_torch() -> None:
    here, on_gpu = (
        [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        for name in ("constraints.txt", "constraints-gpu.txt")
    )
    assert on_gpu == [line for line in here if not line.startswith("torch==")]
    assert len(on_gpu) == len(here) - 1
