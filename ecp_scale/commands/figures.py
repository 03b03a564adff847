"""Figures of an evaluation beside the perplexity: as lines, for JSON, and as a picture."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ecp_scale.checkpoint.export import ExportedModel
from ecp_scale.data.corpus import Corpus
from ecp_scale.data.manifest import manifest_path
from ecp_scale.errors import InputError
from ecp_scale.evaluation import classification, context
from ecp_scale.evaluation.perplexity import Text
from ecp_scale.models.language_model import LanguageModel


@dataclass(frozen=True)
class Figures:
    """What is printed, what JSON gets, and what draws it into a file."""

    lines: list[str]
    content: dict[str, Any]
    draw: Callable[[Path], None]

    def draw_to(self, file: str | None) -> None:
        """Draw, where a file is given.

        Raises:
            InputError: if it cannot be written.
        """
        if file is None:
            return
        try:
            self.draw(Path(file))
        except ImportError as error:
            raise InputError("--plot needs matplotlib: pip install 'ecp-scale[export]'") from error
        except OSError as error:
            raise InputError(f"--plot {file}: {error.strerror or error}") from error


def classified(exported: ExportedModel, model: LanguageModel, prefix: str) -> Figures:
    """How a classifier does on shards with labels.

    Raises:
        InputError: if they have none, or other windows than the model.
    """
    if not manifest_path(Path(prefix)).exists():
        raise InputError(
            f"--data {prefix}: no shards; the model is a classifier, which reads those of ecp-preprocess with a recipe "
            "of images, by their prefix"
        )
    corpus = Corpus(prefix, exported.config.sequence_length)
    classification.check_labels(corpus)
    found = classification.classify(model, corpus)
    low, high = found.interval
    lines = [
        f"accuracy                     {found.accuracy:.4f} ({low:.4f} to {high:.4f}, 95 %)",
        f"nll                          {found.nll:.4f}",
        f"windows                      {found.windows:,}",
    ]
    names = [*found.labels, classification.NO_LABEL]
    lines.append("true label (row) and what was said (column); none is no label at all")
    width = max(5, *map(len, names))
    lines.append(" ".join([" " * width, *(f"{name:>{width}}" for name in names)]))
    for name, row in zip(found.labels, found.confusion, strict=True):
        lines.append(" ".join([f"{name:{width}}", *(f"{count:{width}}" for count in row)]))
    return Figures(lines, classification.content(found), partial(classification.draw, found))


def by_place(
    exported: ExportedModel, model: LanguageModel, text: Text, positions: bool | None, contexts: list[int] | None
) -> Figures:
    """Loss by position and with the context cut short, where they are asked for; all ranks of the model take part.

    Raises:
        InputError: if the text or the architecture does not serve.
    """
    end, field = exported.tokenizer.end_of_document, exported.config.receptive_field_tokens
    places = context.by_position(model, text, end) if positions else []
    seen = context.by_context(model, text, end, contexts) if contexts else []
    lines = [f"position {one.first:6,} to {one.last:6,}      {one.nll:.4f}{_error(one.error)}" for one in places]
    for one in seen:
        more = f", {one.difference:+.4f}{_error(one.error)}" if one.context is not None else ""
        beyond = " (from the receptive field on)" if one.context is not None and one.context >= field else ""
        name = "uncut" if one.context is None else f"{one.context:,}"
        lines.append(f"context {name:>17}    {one.nll:.4f}{more}{beyond}")
    content = {
        "by_position": [dataclasses.asdict(one) for one in places],
        "by_context": [dataclasses.asdict(one) for one in seen],
    }
    content = {name: some for name, some in content.items() if some}
    return Figures(lines, content, lambda file: context.draw(places, seen, field, file))


def _error(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"
