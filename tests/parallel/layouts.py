"""Training runs of one small model in several layouts, each done once per test session."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.corpus import ShardedText
from tests.launching import ROOT, run_successfully

STEPS = 20
SMALL_MODEL = {
    "model.layers": 2,
    "model.width": 48,
    "model.heads": 6,
    "model.feed_forward_width": 96,
    "model.sequence_length": 64,
    "model.segment_length": 32,
    # Not a multiple of the vocabulary under TP 2, and another padding there than under TP 1.
    "model.vocab_multiple": 11,
    "model.vocab_size": "null",
    "model.dropout": 0.0,
}
SETTINGS = {
    "paper": {"model.preset": "paper-12l", **SMALL_MODEL},
    "scaled": {"model.preset": "scaled-125m", **SMALL_MODEL, "model.key_value_heads": 2},
}
RECIPE = {
    "optimizer.schedule": "cosine",
    "optimizer.warmup_tokens": 1000,
    "optimizer.learning_rate": 2e-3,
    "optimizer.gradient_clipping": 1.0,
    "training.precision": "fp32",
    "training.steps": STEPS,
    "training.global_batch_size": 4,
    "training.micro_batch_size": 1,
    "training.validation_every_steps": STEPS,
    "training.validation_windows": 8,
    "checkpoint.every_steps": STEPS,
}


@dataclass(frozen=True)
class Layout:
    """How a run is spread: tensor-parallel and data-parallel ranks, ZeRO stage, settings, update rule."""

    tensor: int = 1
    data: int = 1
    zero: int = 0
    settings: str = "scaled"
    optimizer: str = "adamw"
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.settings}-tp{self.tensor}-dp{self.data}-zero{self.zero}-{self.optimizer}-{self.precision}"

    @property
    def ranks(self) -> int:
        """Ranks of the launch."""
        return self.tensor * self.data

    def options(self, text: ShardedText, output: Path) -> list[str]:
        """Command line of the run."""
        values: dict[str, object] = {
            **SETTINGS[self.settings],
            **RECIPE,
            "optimizer.name": self.optimizer,
            "training.precision": self.precision,
            "parallel.tensor": self.tensor,
            "data.prefix": text.prefix,
            "data.validation_prefix": text.prefix,
            "training.output_dir": output,
        }
        if self.optimizer == "sgd":
            values["optimizer.learning_rate"] = 0.3
        words = [f"--{key}={value}" for key, value in values.items()]
        return [*words, "--deepspeed_config", str(ROOT / f"ds_configs/zero{self.zero}.json")]


CURVES = [
    Layout(tensor=2),
    Layout(data=2, zero=0),
    Layout(data=2, zero=1),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
    Layout(tensor=2, data=2, zero=1),
    # SGD shows a wrong scale of the gradient, which AdamW hides.
    Layout(tensor=2, data=2, zero=1, settings="paper", optimizer="sgd"),
]
"""Layouts whose curves must equal the one of a single process."""
BF16 = [Layout(data=2, zero=zero, precision="bf16") for zero in (1, 2, 3)]
"""Layouts that train in bf16 with fp32 master weights."""
CONVERTED = [
    Layout(),
    Layout(tensor=2, zero=1),
    Layout(tensor=2, zero=3),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
    Layout(tensor=2, data=2, zero=1),
    Layout(tensor=2, data=2, zero=3),
    *BF16,
]
"""Layouts whose checkpoints are converted."""
ALL = {*CURVES, *CONVERTED, Layout(settings="paper", optimizer="sgd")}


@cache
def _trained_on(ranks: int, text: ShardedText) -> Path:
    """Folder with the runs of all layouts of ``ranks`` ranks; one launch for all, since its start takes longest."""
    folder = text.folder / f"layouts-of-{ranks}"
    folder.mkdir()
    layouts = sorted((layout for layout in ALL if layout.ranks == ranks), key=str)
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps([layout.options(text, folder / str(layout)) for layout in layouts]))
    run_successfully("tests/parallel/train_layouts.py", jobs, ranks=ranks)
    return folder


def trained(layout: Layout, text: ShardedText) -> Path:
    """Run folder of a layout of ``ALL``, trained when first asked for."""
    assert layout in ALL
    return _trained_on(layout.ranks, text) / str(layout)
