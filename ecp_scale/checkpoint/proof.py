"""Whether an exported model is the one that was trained: the digest of every weight, and the loss of the probe."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist

from ecp_scale.checkpoint.export import ExportedModel
from ecp_scale.checkpoint.weights_file import SavedWeights
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.models.probe import is_same, probe_loss
from ecp_scale.parallel.digests import difference
from ecp_scale.parallel.groups import agreed, decided


class Proof(NamedTuple):
    """Lines for the user, and whether the model is what was trained."""

    lines: list[str]
    is_right: bool


def prove(exported: ExportedModel, model: LanguageModel, precision: str) -> Proof:
    """Compute digests and the probe's loss again; all ranks take part, and get the same.

    Args:
        exported: the model folder.
        model: made from it, on these ranks.
        precision: of the model.

    Raises:
        InputError: if the weights cannot be read.
    """
    expected = agreed(lambda: SavedWeights(exported.folder).digests)
    found: Mapping[str, str] = {}
    if expected:
        weights = SavedWeights(exported.folder)
        found = agreed(lambda: weights.computed_digests() if dist.get_rank() == 0 else {}, takes_long=True)
    proof = decided(lambda: _of_digests(found, expected))
    if not expected:
        return proof
    if exported.probe_loss is None:
        lines = ["probe       no loss is known: what was trained was saved by an earlier version"]
        return Proof([*proof.lines, *lines], False)
    loss = probe_loss(model)
    stored = "fp32" if exported.dtype == torch.float32 else "bf16"
    is_right = is_same(loss, exported.probe_loss, precision, stored, exported.precision)
    text = f"probe       loss {loss:.6f} in {precision}, {exported.probe_loss:.6f} in training in {exported.precision}"
    return Proof([*proof.lines, text + ("" if is_right else ": NOT THE SAME")], proof.is_right and is_right)


def _of_digests(found: Mapping[str, str], expected: Mapping[str, str]) -> Proof:
    if not expected:
        text = "the files say none: transformers or an earlier version have written them"
        return Proof([f"digests     {text}"], False)
    differing = difference(found, expected)
    if differing is not None:
        return Proof([f"digests     NOT THE SAME: {differing}"], False)
    return Proof([f"digests     all {len(expected)} tensors are what was written"], True)
