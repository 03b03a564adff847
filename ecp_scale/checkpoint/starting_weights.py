"""The weights of an exported model as those that a new run begins with."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ecp_scale.checkpoint.export import ExportedModel
from ecp_scale.checkpoint.hugging_face import NOT_THEIRS
from ecp_scale.checkpoint.weights_file import SavedWeights
from ecp_scale.config import Config, ModelConfig
from ecp_scale.config.model import GEOMETRY_FIELDS
from ecp_scale.data.corpus import Corpus
from ecp_scale.errors import InputError
from ecp_scale.parallel.partition import Share
from ecp_scale.zero.saved_states import WEIGHT, ParameterStates

FREE = (*NOT_THEIRS, "dropout", *GEOMETRY_FIELDS)
"""Fields of the model's config that may be others than in the training of the weights."""


def check_starting_weights(folder: Path, config: Config, corpus: Corpus) -> ExportedModel:
    """Refuse weights that a run cannot begin with; for one rank to ask, before anything is built.

    Args:
        folder: of the exported model.
        config: of the run, with its vocabulary known.
        corpus: the first one that it reads.

    Raises:
        InputError: listing what differs and must not.
    """
    exported = ExportedModel.open(folder)
    found, wanted = exported.config, config.model
    problems = [
        f"model.{item.name} is {getattr(wanted, item.name)!r}, that of the weights {getattr(found, item.name)!r}"
        for item in dataclasses.fields(ModelConfig)
        if item.name not in FREE and item.name not in wanted.ignored() and not _same(found, wanted, item.name)
    ]
    problems += wanted.weights_problems(found)
    tokenizer, now = exported.tokenizer, corpus.manifest.tokenizer
    if tokenizer.sha256 != now.sha256:
        problems.append(
            f"the tokenizer of {corpus.prefix} is {now.kind} {now.sha256[:12]}..., that of the weights "
            f"{tokenizer.kind} {tokenizer.sha256[:12]}..."
        )
    elif tokenizer.end_of_document != now.end_of_document:
        problems.append(
            f"documents of {corpus.prefix} end with id {now.end_of_document}, those of the weights with "
            f"{tokenizer.end_of_document}"
        )
    if problems:
        raise InputError(
            f"--init-from {folder} does not fit the run:\n" + "\n".join(f"  - {text}" for text in problems)
        )
    weights = SavedWeights(folder)
    elements = sum(math.prod(weights[name].shape) for name in weights)
    if elements != wanted.parameters:
        raise InputError(f"{weights.path}: holds {elements:,} parameters, expected {wanted.parameters:,}")
    return exported


def _same(found: ModelConfig, wanted: ModelConfig, name: str) -> bool:
    if name == "key_value_heads":
        # Equal numbers of other widths are not named: the width or the heads are.
        return found.key_value_heads == wanted.key_value_heads or found.key_value_width == wanted.key_value_width
    if name == "compressed_context":
        return found.geometry.compressed_context == wanted.geometry.compressed_context
    return bool(getattr(found, name) == getattr(wanted, name))


class StartingWeights:
    """The weights of a model folder, as ``ecp_scale.zero.filling.fill`` asks for them."""

    def __init__(self, folder: Path) -> None:
        self._weights = SavedWeights(folder)
        self.digests = self._weights.digests
        """Of every tensor; empty where transformers have saved them."""

    def keys(self, name: str) -> list[str]:
        """The weight alone: the optimizer begins anew."""
        if name not in self._weights:
            raise InputError(f"{self._weights.path}: has no {name}")
        return [WEIGHT]

    def read(self, name: str, share: Share, start: int, stop: int, keys: Sequence[str]) -> ParameterStates:
        """Elements of a rank's share, flat and in fp32; see ``SavedStates.read``."""
        if not keys:
            return {}
        whole = self._weights[name][:].flatten()
        out = torch.zeros(stop - start)
        for run in share.runs(start, stop):
            out[run.start - start :][: run.length] = whole[run.whole_start :][: run.length]
        return {WEIGHT: out}
