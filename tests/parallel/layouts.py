"""Training runs of one small model in several layouts, each done once per test session."""

import itertools
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ecp_scale.config.geometry import GEOMETRIES
from tests.corpus import ShardedText
from tests.launching import ROOT, run_successfully

LATENT = {name for name, geometry in GEOMETRIES.items() if not geometry.streams}
SMALL_MODEL = {
    "model.layers": 2,
    "model.width": 48,
    "model.heads": 8,
    "model.feed_forward_width": 96,
    "model.sequence_length": 64,
    "model.segment_length": 16,
    "model.allow_short_receptive_field": True,
    "model.latents": 32,
    "model.compressed_context": 12,
    "model.window": 32,
    "model.group_length": 48,
    # Not a multiple of the vocabulary under TP 2, and another padding there than under TP 1.
    "model.vocab_multiple": 11,
    "model.vocab_size": "null",
    "model.dropout": 0.0,
}
SETTINGS = {
    "paper": {"model.preset": "paper-12l", **SMALL_MODEL},
    "scaled": {"model.preset": "scaled-125m", **SMALL_MODEL, "model.key_value_heads": 4},
}
RECIPE = {
    "optimizer.schedule": "cosine",
    "optimizer.warmup_tokens": 1000,
    "optimizer.learning_rate": 2e-3,
    # Where a gradient is zero but for rounding (a query that sees one key), AdamW with its usual epsilon of 1e-8 would
    # blow the rounding, which differs between layouts, up to a step.
    "optimizer.epsilon": 1e-5,
    "optimizer.gradient_clipping": 1.0,
    "training.precision": "fp32",
    "training.global_batch_size": 4,
    "training.micro_batch_size": 1,
    "training.validation_windows": 8,
}


@dataclass(frozen=True)
class Layout:
    """How a run is spread: ranks of every kind, ZeRO stage, what is recomputed; and what it trains."""

    tensor: int = 1
    data: int = 1
    context: int = 1
    zero: int = 0
    sequence: bool = False
    recompute: str = "none"
    settings: str = "scaled"
    optimizer: str = "adamw"
    precision: str = "fp32"
    architecture: str = "ecp"
    steps: int = 12
    masked: bool = False
    offload: bool = False

    def __str__(self) -> str:
        parts = [self.architecture, *(["masked"] if self.masked else []), f"{self.steps}-steps", self.settings]
        spread = f"tp{self.tensor}{'-sp' if self.sequence else ''}-cp{self.context}-dp{self.data}-zero{self.zero}"
        spread += "-offload" * self.offload
        again = [] if self.recompute == "none" else [self.recompute]
        return "-".join([*parts, spread, *again, self.optimizer, self.precision])

    def alone(self) -> "Layout":
        """The same training in one process."""
        return replace(self, tensor=1, data=1, context=1, zero=0, sequence=False, recompute="none", offload=False)

    @property
    def ranks(self) -> int:
        """Ranks of the launch."""
        return self.tensor * self.context * self.data

    def options(self, text: ShardedText, output: Path) -> list[str]:
        """Command line of the run."""
        values: dict[str, object] = {
            **SETTINGS[self.settings],
            **RECIPE,
            "optimizer.name": self.optimizer,
            "training.precision": self.precision,
            "training.steps": self.steps,
            "training.validation_every_steps": self.steps,
            "checkpoint.every_steps": self.steps,
            "model.architecture": self.architecture,
            "parallel.tensor": self.tensor,
            "parallel.context": self.context,
            "parallel.sequence": self.sequence,
            "parallel.recompute": self.recompute,
            "data.prefix": text.prefix,
            "data.validation_prefix": text.prefix,
            "training.output_dir": output,
        }
        if self.settings == "paper" and self.architecture in LATENT:
            values["model.key_value_norm"] = True
        if self.architecture == "split_attention":
            values["model.segment_length"] = 16
        if self.masked:
            # The documents of the text are longer than a window; a frequent token makes documents of a few tokens.
            values["attention.document_mask"] = True
            values["attention.end_of_document"] = text.most_frequent_token()
            values["data.loss_ignore_ids"] = [text.most_frequent_token()]
            values["training.z_loss"] = 0.01
        if self.optimizer == "sgd":
            values["optimizer.learning_rate"] = 0.3
        if self.optimizer == "muon":
            values["optimizer.average_decay"] = 0.9
        words = [f"--{key}={value}" for key, value in values.items()]
        file = f"zero{self.zero}{'_offload' * self.offload}.json"
        return [*words, "--deepspeed_config", str(ROOT / "ds_configs" / file)]


FEATURES: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 2),
    "context": (1, 2),
    "data": (1, 2),
    "zero": (0, 1, 2, 3),
    "sequence": (False, True),
    "recompute": ("none", "selective", "full"),
    "settings": ("paper", "scaled"),
    # SGD shows a wrong scale of the gradient, which AdamW hides; Muon needs whole matrices.
    "optimizer": ("adamw", "sgd", "muon"),
}
PRODUCT = [
    layout
    for values in itertools.product(*FEATURES.values())
    if (layout := Layout(**dict(zip(FEATURES, values, strict=True)))).ranks <= 4
    and layout.tensor > layout.sequence
    and not (layout.optimizer == "muon" and layout.zero == 3)
    and layout != layout.alone()
]
"""Every combination of the features on up to four ranks that is allowed."""


def pairs(layout: Layout) -> set[tuple[tuple[str, object], ...]]:
    """Every pair of features that a layout has."""
    return set(itertools.combinations([(name, getattr(layout, name)) for name in FEATURES], 2))


def pairwise(layouts: list[Layout]) -> list[Layout]:
    """Some of the layouts that have every pair of features that any of them has; few, and on few ranks."""
    missing = set().union(*map(pairs, layouts))
    chosen = []
    while missing:
        best = max(layouts, key=lambda layout: (len(pairs(layout) & missing) / layout.ranks**0.5, str(layout)))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


CURVES = [
    *pairwise(PRODUCT),
    Layout(context=4, zero=1, masked=True),
    Layout(tensor=4, sequence=True, zero=2, recompute="selective"),
    Layout(context=2, architecture="sliding_window", masked=True),
    Layout(data=2, zero=2, offload=True),
    Layout(data=2, zero=3, offload=True),
    Layout(tensor=2, data=2, zero=2, optimizer="muon"),
    # The only architecture with a matrix of its own, which every tensor rank applies to its own channels.
    Layout(tensor=2, data=2, zero=3, settings="paper", architecture="compressed_double_attention", masked=True),
]
"""Layouts whose curves must equal the one of a single process."""
ARCHITECTURE_CURVES = [
    Layout(
        tensor=tensor,
        data=data,
        zero=zero,
        settings="paper" if name in LATENT else "scaled",
        architecture=name,
        steps=16,
        masked=number % 2 == 1,
    )
    for tensor, data, zero in ((2, 1, 0), (1, 2, 1))
    for number, name in enumerate(GEOMETRIES)
]
"""Every architecture, half of them with a document mask: under tensor parallelism, then on two replicas."""
ARCHITECTURE_CURVES, MORE_ARCHITECTURE_CURVES = ARCHITECTURE_CURVES[:-6], ARCHITECTURE_CURVES[-6:]
BF16 = [Layout(data=2, zero=zero, precision="bf16") for zero in (1, 2, 3)]
"""Layouts that train in bf16 with fp32 master weights."""
CONVERTED = [
    Layout(),
    Layout(tensor=2, zero=1),
    Layout(tensor=2, zero=3),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
    Layout(tensor=2, data=2, zero=2, optimizer="muon"),
    *(layout for layout in CURVES if layout.context * layout.tensor == 4 or layout.offload),
    *(layout for layout in CURVES + ARCHITECTURE_CURVES if layout.architecture == "compressed_double_attention"),
    *BF16,
]
"""Layouts whose checkpoints are converted."""
MORE_CONVERTED = [Layout(tensor=2, data=2, zero=1), Layout(tensor=2, data=2, zero=3)]
LAUNCH_SECONDS = 5000
"""The product's largest launches train about sixty layouts on four ranks."""
ALL = {layout.alone() for layout in (*PRODUCT, *CURVES, *ARCHITECTURE_CURVES)} | {
    *CURVES,
    *ARCHITECTURE_CURVES,
    *CONVERTED,
}


@cache
def _trained_together(ranks: int, kind: str, text: ShardedText) -> Path:
    """Folder with the runs of all layouts of ``ranks`` ranks; one launch for many, since its start takes longest."""
    folder = text.folder / f"{kind}-on-{ranks}"
    assert not folder.exists(), f"the launch of {folder.name} has failed before"
    folder.mkdir()
    known = (*PRODUCT, *MORE_ARCHITECTURE_CURVES, *ALL)
    layouts = [layout for layout in known if (layout.ranks, _kind(layout)) == (ranks, kind)]
    listed = [
        {"options": layout.options(text, folder / str(layout)), "probed": layout in (*CONVERTED, *MORE_CONVERTED)}
        for layout in sorted(set(layouts), key=str)
    ]
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps(listed))
    run_successfully("tests/parallel/train_layouts.py", jobs, ranks=ranks, timeout=LAUNCH_SECONDS)
    return folder


def _kind(layout: Layout) -> str:
    """Which launch a layout belongs to."""
    if layout not in ALL:
        return "more-architectures" if layout.steps > 12 else f"product-zero{layout.zero}"
    return "architectures" if layout.steps > 12 else "layouts"


def trained(layout: Layout, text: ShardedText) -> Path:
    """Run folder of a layout of ``ALL`` or of ``PRODUCT``, trained when first asked for."""
    return _trained_together(layout.ranks, _kind(layout), text) / str(layout)
