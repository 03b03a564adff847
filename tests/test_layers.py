"""Layers and imports: which package may import which, and who knows DeepSpeed and Megatron-core."""

import ast
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT

LAYERS = [
    {"config", "errors", "console", "files", "option_parser", "precision", "hub"},
    {"cluster"},
    {"data"},
    {"attention", "parallel", "preparation"},
    {"models"},
    {"zero"},
    {"command_line"},
    {"checkpoint", "evaluation", "planning"},
    {"training", "api"},
    {"doctor"},
    {"__init__"},
    {"commands"},
    {"launch", "data_tools"},
]
"""Packages and top-level modules from the lowest layer up. A file imports its own package and lower layers."""
LIBRARIES = {
    "config": {"jsonargparse"},
    "command_line": {"yaml"},
    "cluster": {"filelock", "psutil", "torch"},
    "attention": {"numpy", "torch"},
    "hub": {"sentencepiece", "torch", "transformers"},
    "data": {"filelock", "huggingface_hub", "numpy", "sentencepiece", "tokenizers", "torch"},
    "preparation": {"backports", "datasets", "numpy", "pyarrow", "sentencepiece", "jinja2", "PIL", "tqdm"},
}
"""Libraries that a package may import, where that is limited."""


def package_of(path: Path) -> str:
    """Package of a source file, or its top-level module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "ecp_scale" else parts[0]


def layer_of(package: str) -> int:
    """Number of a package's layer, 0 for the lowest."""
    found = [number for number, packages in enumerate(LAYERS) if package in packages]
    assert found, f"{package} is in no layer"
    return found[0]


def sources() -> list[Path]:
    """Every file of the package and its programs."""
    return [path for folder in ("ecp_scale", "launch", "data_tools") for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # What travels in the folder of an exported model imports its neighbours there.
            assert node.level == (path.parent.name == "hub" and (node.module or "").endswith("_ecp")), path
            if not node.level:
                found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downhill(path: Path) -> None:
    package = package_of(path)
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] != "ecp_scale" or len(parts) < 2 or parts[1] == package:
            continue
        lowest = layer_of(package) == layer_of(parts[1]) == 0
        assert lowest or layer_of(parts[1]) < layer_of(package), f"{path.name} in {package} imports {module}"


@pytest.mark.parametrize(("library", "places"), [("deepspeed", ["zero"]), ("megatron", ["parallel/megatron.py"])])
def test_one_place_knows_a_library(library: str, places: list[str]) -> None:
    for path in sources():
        tops = {module.split(".")[0] for module in imported_modules(path)}
        inside = any(str(path).startswith(str(ROOT / "ecp_scale" / place)) for place in places)
        assert library not in tops or inside, f"{path} imports {library}"


@pytest.mark.parametrize("package", LIBRARIES)
def test_some_packages_import_few_libraries(package: str) -> None:
    for path in sources():
        if package_of(path) == package:
            tops = {module.split(".")[0] for module in imported_modules(path)}
            assert tops - set(sys.stdlib_module_names) - {"ecp_scale"} <= LIBRARIES[package], path


def test_no_script_shadows_a_standard_module() -> None:
    for folder in ("launch", "data_tools", "tests"):
        names = {path.stem for path in (ROOT / folder).glob("*.py")}
        assert not names & set(sys.stdlib_module_names)


def test_files_and_functions_are_of_readable_size() -> None:
    for path in sources():
        text = path.read_text()
        assert text.count("\n") <= 300, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 65, f"{path}: {node.name} has {length} lines"


def test_everything_public_has_a_docstring() -> None:
    for path in sources():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) is not None, path
        public = [node for node in tree.body if _is_public(node)]
        public += [item for node in public if isinstance(node, ast.ClassDef) for item in node.body if _is_public(item)]
        for node in public:
            assert isinstance(node, ast.FunctionDef | ast.ClassDef)
            assert ast.get_docstring(node), f"{path}: {node.name}"


def _is_public(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
