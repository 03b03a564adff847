"""Compare the paper's models with golden numbers of the authors' release: logits, loss and every gradient.

    python tests/parity.py tests/golden/*.safetensors [--tp N]

With ``--tp N`` it starts N ranks itself; under torchrun it uses the ranks that are there. Exits 1 above tolerance.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ecp_scale.cluster.ranks import Ranks
from ecp_scale.config import ModelConfig, ParallelConfig
from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.parallel.context import ParallelContext
from ecp_scale.parallel.groups import Groups, agreed, process_groups
from ecp_scale.parallel.megatron import gather_from_tensor_model_parallel_region
from ecp_scale.parallel.partition import Partition, load_full
from ecp_scale.planning.rehearsal import torchrun

LOGITS_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

NAMES = [
    (r"^token_emb\.", "embedding."),
    (r"^layers\.(\d+)\.0\.norm\.", r"layers.\1.attention_norm."),
    (r"^layers\.(\d+)\.0\.fn\.to_q\.", r"layers.\1.attention.query."),
    (r"^layers\.(\d+)\.0\.fn\.to_kv\.", r"layers.\1.attention.key."),
    (r"^layers\.(\d+)\.0\.fn\.to_out_0\.", r"layers.\1.attention.first_output."),
    (r"^layers\.(\d+)\.0\.fn\.(?:to_out|w_out)\.", r"layers.\1.attention.output."),
    (r"^layers\.(\d+)\.0\.fn\.norm\.", r"layers.\1.attention.key_value_norm."),
    (r"^layers\.(\d+)\.0\.fn\.projection_hist\.", r"layers.\1.attention.pattern.compression."),
    (r"^layers\.(\d+)\.1\.norm\.", r"layers.\1.feed_forward_norm."),
    (r"^layers\.(\d+)\.1\.fn\.net\.0\.", r"layers.\1.feed_forward.up."),
    (r"^layers\.(\d+)\.1\.fn\.net\.3\.", r"layers.\1.feed_forward.down."),
    (r"^to_logits\.0\.", "norm."),
    (r"^to_logits\.1\.", "output."),
]
"""The release's parameter names and ours."""


SEGMENTED: dict[str, Callable[[int, int], int]] = {
    "ecp": lambda length, latents: length,
    "split_attention": lambda length, latents: length - latents,
    **dict.fromkeys(
        ("perceiver_ar", "double_attention", "compressed_double_attention"), lambda length, latents: length
    ),
}
"""The architectures of the release, and the positions that its ``segments`` divide."""


def our_name(name: str) -> str:
    """Our name of a parameter of the release."""
    for pattern, replacement in NAMES:
        name, count = re.subn(pattern, replacement, name)
        if count:
            return name
    raise InputError(f"golden parameter {name!r} has no counterpart in this model")


def read_golden(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a golden file."""
    if not Path(path).is_file():
        raise InputError(f"golden file {path} does not exist")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def golden_config(metadata: dict[str, str]) -> ModelConfig:
    """The paper's settings at the file's sizes."""
    architecture = metadata["architecture"]
    if architecture not in SEGMENTED:
        raise InputError(f"architecture {architecture!r}, expected one of {', '.join(SEGMENTED)}")
    width, length, latents = (int(metadata[name]) for name in ("dim", "sequence_length", "latent_length"))
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(metadata["vocab"]),
        vocab_multiple=1,
        layers=int(metadata["layers"]),
        width=width,
        heads=int(metadata["heads"]),
        feed_forward_width=int(metadata["ff_mult"]) * width,
        sequence_length=length,
        segment_length=SEGMENTED[architecture](length, latents) // int(metadata["segments"]),
        latents=latents,
        compressed_context=int(metadata["compression"]),
        compression_residual="release",
        norm="layernorm",
        activation="gelu",
        bias=True,
        tied_key_value=True,
        rotary="every_layer" if architecture == "double_attention" else "first_layer",
        qk_norm=False,
        key_value_norm=architecture != "ecp",
        first_segment_projection=True,
        initialization="pytorch",
    )


def compare(path: str, groups: Groups) -> dict[str, float]:
    """Largest errors of one file: logits and loss absolute, gradients relative to the largest entry of each."""
    golden, metadata = read_golden(path)
    config = golden_config(metadata)
    unused = set(json.loads(metadata["parameters_without_gradient"]))
    names = {
        name: our_name(name)
        for name in (key.removeprefix("param/") for key in golden if key.startswith("param/"))
        if name not in unused
    }
    parallel = ParallelContext(groups.tensor)
    model = LanguageModel(config, parallel)
    load_full(model, parallel, {ours: golden[f"param/{name}"] for name, ours in names.items()}, path)
    model.to(groups.device).eval()

    tokens = golden["tokens"].to(groups.device)
    errors = {"logits": (model.logits(tokens[:, :-1]).cpu() - golden["logits"]).abs().max().item()}
    total, losses = model(tokens[:, :-1], tokens[:, 1:])
    loss = total / losses.numel()
    loss.backward()
    errors["loss"] = abs(loss.item() - golden["loss"].item())
    parameters = dict(model.named_parameters())
    worst = 0.0
    for name, ours in names.items():
        expected = golden[f"grad/{name}"]
        got = _whole_gradient(parameters[ours], parallel).cpu()
        worst = max(worst, ((got - expected).abs().max() / expected.abs().max()).item())
    errors["gradients"] = worst
    return errors


def _whole_gradient(parameter: torch.nn.Parameter, parallel: ParallelContext) -> Tensor:
    partition, gradient = Partition.of(parameter), parameter.grad
    assert gradient is not None
    if partition.partition_dim is None:
        return gradient
    moved = gradient.movedim(partition.partition_dim, -1).contiguous()
    whole = gather_from_tensor_model_parallel_region(moved, group=parallel.tp_group).movedim(
        -1, partition.partition_dim
    )
    return whole if partition.vocabulary_rows is None else whole[: partition.vocabulary_rows]


def main() -> int:
    """Print one row per file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument(
        "--tp", type=int, metavar="N", help="tensor-parallel ranks (default: those of the launch, or 1)"
    )
    arguments = parser.parse_args()
    ranks = Ranks.from_environment()
    if arguments.tp and "RANK" not in os.environ and arguments.tp > 1:
        return subprocess.call([*torchrun(arguments.tp), __file__, *arguments.files])
    tolerances = {"logits": LOGITS_TOLERANCE, "loss": LOSS_TOLERANCE, "gradients": GRADIENT_TOLERANCE}
    failed = False
    with process_groups(ParallelConfig(tensor=arguments.tp or ranks.world_size)) as groups:
        for path in arguments.files:
            errors = agreed(partial(compare, path, groups))
            failed |= any(errors[key] > tolerances[key] for key in tolerances)
            if ranks.rank == 0:
                columns = "  ".join(f"{key} {errors[key]:.1e} (limit {tolerances[key]:.0e})" for key in tolerances)
                print(f"{Path(path).name}  tp {groups.tensor.size()}  {columns}")
    return int(failed)


if __name__ == "__main__":
    with input_errors_exit():
        sys.exit(main())
