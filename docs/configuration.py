"""Write docs/configuration.md from the dataclasses: python docs/configuration.py."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from pathlib import Path
from typing import Any

from ecp_scale.config.options import SECTIONS, values_of
from ecp_scale.config.resume import rule

HEAD = """# Configuration

Every field of a run, from `python docs/configuration.py`. A YAML file has the sections as keys; on the command line a
field is `--section.key value`. Later wins: defaults, preset (`model.preset`, or `--config NAME`), file, command line.

On a resume *fixed* fields are refused when they differ from the checkpoint's; others take effect from the next step on
(*may change*) or never touch the weights (*never matters*).
"""


def docstrings(section: type) -> dict[str, str]:
    """The text below each field of a dataclass."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(section)))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    found = {}
    for field, text in itertools.pairwise(body):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            found[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
    return found


def default_of(field: "dataclasses.Field[Any]") -> str:
    """The default as YAML has it."""
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name, section in SECTIONS.items():
        texts = docstrings(section)
        lines += [f"## {name}", "", inspect.cleandoc(section.__doc__ or "").partition("\n")[0], ""]
        lines += ["| field | values | default | on a resume | |", "|---|---|---|---|---|"]
        for field in dataclasses.fields(section):
            hint = inspect.get_annotations(section, eval_str=True)[field.name]
            cells = (
                f"`{field.name}`",
                values_of(hint),
                default_of(field),
                rule(f"{name}.{field.name}"),
                texts[field.name].replace("|", "\\|"),
            )
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
