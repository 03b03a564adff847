"""Whether an exported model is the one that was trained: the digest of every weight, and the loss of the probe."""

from typing import NamedTuple

import torch

from ecp_scale.checkpoint.export import ExportedModel
from ecp_scale.checkpoint.hugging_face import hashes_of_read_files
from ecp_scale.checkpoint.weights_file import SavedWeights
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.models.probe import is_same, probe_loss
from ecp_scale.parallel.digests import difference
from ecp_scale.parallel.groups import decided, decided_slowly


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
    # The first rank's files are looked at; another host may see other ones, of which its part of the model is made.
    proof = decided_slowly(lambda: _of_files(exported))
    known = decided(lambda: (exported.probe_loss, exported.precision, exported.dtype, exported.average))
    loss, (expected, trained_in, dtype, average) = probe_loss(model), known
    if average:
        line = f"probe       loss {loss:.6f} in {precision}; the training computed with no average"
        return Proof([*proof.lines, line], proof.is_right)
    if expected is None:
        line = f"probe       loss {loss:.6f} in {precision}; that of the training was not saved"
        return Proof([*proof.lines, line], False)
    stored = "fp32" if dtype == torch.float32 else "bf16"
    is_right = is_same(loss, expected, precision, stored, trained_in)
    text = f"probe       loss {loss:.6f} in {precision}, {expected:.6f} in training in {trained_in}"
    return Proof([*proof.lines, text + ("" if is_right else ": NOT THE SAME")], proof.is_right and is_right)


def _of_files(exported: ExportedModel) -> Proof:
    """What the first rank finds in the files."""
    proof, found = _of_digests(SavedWeights(exported.folder)), hashes_of_read_files(exported.folder)
    changed = [name for name, text in exported.files.items() if found.get(name) != text]
    if not exported.files:
        return proof
    text = f"NOT THE SAME: {', '.join(changed)}" if changed else f"all {len(exported.files)} are what was written"
    return Proof([*proof.lines, f"code        {text}"], proof.is_right and not changed)


def _of_digests(weights: SavedWeights) -> Proof:
    """What is found in the files of weights."""
    expected = weights.digests
    if not expected:
        text = "the files say none: transformers or an earlier version have written them"
        return Proof([f"digests     {text}"], False)
    differing = difference(weights.computed_digests(), expected)
    if differing is not None:
        return Proof([f"digests     NOT THE SAME: {differing}"], False)
    return Proof([f"digests     all {len(expected)} tensors are what was written"], True)
