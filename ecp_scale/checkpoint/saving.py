"""Save and resume a run through DeepSpeed."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from ecp_scale.checkpoint.folder import CheckpointRecord, checkpoints_folder, find_checkpoint, remove_old, tag
from ecp_scale.checkpoint.reshaping import load_reshaped
from ecp_scale.config import Config, ModelConfig
from ecp_scale.config.model import GEOMETRY_FIELDS
from ecp_scale.data.blend import Blend
from ecp_scale.errors import InputError
from ecp_scale.models.sharding import layouts
from ecp_scale.parallel.groups import agreed

HARMLESS_MODEL_FIELDS = {"preset", "allow_short_reach", "dropout", *GEOMETRY_FIELDS}
"""Model fields that may change over a resume; of the geometry, if the weights allow it."""
HARMLESS = {f"model.{name}" for name in HARMLESS_MODEL_FIELDS} | {"attention.backend"}


@dataclass(frozen=True)
class Progress:
    """How far a run is. Steps may differ in tokens where the sequence length has been changed."""

    step: int = 0
    tokens: int = 0
    ledger: int = 0
    """Sum modulo 2^64 of the entries of all samples that were consumed, see ``ecp_scale.data.blend``."""


def save(engine: deepspeed.DeepSpeedEngine, config: Config, blend: Blend, run: Path, done: Progress) -> None:
    """Write the checkpoint of what is done; all ranks take part."""
    folder = checkpoints_folder(run) / tag(done.step)
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        for script in ("zero_to_fp32.py", "zero_to_torch.py"):
            # DeepSpeed's copies refuse every checkpoint with tensor parallelism; launch/convert_checkpoint.py does not.
            (folder.parent / script).unlink(missing_ok=True)
        corpus = blend.corpora[0]
        tokenizer_file = corpus.tokenizer.path.name if corpus.tokenizer.path else ""
        if corpus.tokenizer.path:
            shutil.copyfile(corpus.tokenizer.path, folder / tokenizer_file)
        record = CheckpointRecord(
            step=done.step,
            tokens=done.tokens,
            tokenizer=corpus.manifest.tokenizer,
            tokenizer_file=tokenizer_file,
            layouts=layouts(engine.module),
            files={path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
            ledger=f"{done.ledger:016x}",
            skipped_steps=engine.skipped_steps,
            **_layout(engine, config),
            **_identity(config, blend, done.tokens),
        )
        record.write(folder)
        remove_old(run, config.checkpoint.keep)
    dist.barrier()


def resume(engine: deepspeed.DeepSpeedEngine, config: Config, blend: Blend, run: Path) -> Progress:
    """Load the newest complete checkpoint and return how far it is; nothing where the run has not saved any yet.

    Raises:
        InputError: on all ranks, if the checkpoint was written with another model or other data, or is damaged.
    """
    if not any(checkpoints_folder(run).glob("step-*")):
        return Progress()
    folder = agreed(lambda: find_checkpoint(run))
    saved = agreed(lambda: CheckpointRecord.read(folder))
    record = agreed(lambda: matching_record(folder, _identity(config, blend, saved.tokens)))
    layout = _layout(engine, config)
    if layout == {key: getattr(record, key) for key in layout}:
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    else:
        agreed(lambda: load_reshaped(engine, folder, record))
    return Progress(record.step, record.tokens, int(record.ledger, 16))


def _layout(engine: deepspeed.DeepSpeedEngine, config: Config) -> dict[str, Any]:
    """What decides the form of DeepSpeed's files."""
    return {
        "world_size": dist.get_world_size(),
        "tensor_parallel": config.parallel.tensor,
        "zero_stage": engine.zero_optimization_stage(),
        "precision": config.training.precision,
    }


def _identity(config: Config, blend: Blend, tokens: int) -> dict[str, Any]:
    """What must be the same for a run that is resumed after ``tokens`` tokens to be the same run."""
    return {
        "model": dataclasses.asdict(config.model),
        "attention": dataclasses.asdict(config.attention),
        "data": {
            **blend.history(tokens),
            "tokenizer_sha256": blend.corpora[0].tokenizer.sha256,
            "seed": config.training.seed,
            "global_batch_size": config.training.global_batch_size,
        },
    }


def matching_record(folder: Path, now: dict[str, Any]) -> CheckpointRecord:
    """The record of a checkpoint that the run described by ``now`` continues.

    Raises:
        InputError: listing what differs.
    """
    record = CheckpointRecord.read(folder)
    differences = ModelConfig(**now["model"]).weights_problems(ModelConfig(**record.model))
    pairs: dict[str, tuple[Any, Any]] = {}
    for key, value in now.items():
        saved = getattr(record, key)
        if isinstance(value, dict):
            pairs |= {f"{key}.{name}": (saved.get(name), value[name]) for name in value}
        else:
            pairs[key] = (saved, value)
    differences += [
        f"{key} was {saved!r} and is now {value!r}"
        for key, (saved, value) in pairs.items()
        if saved != value and key not in HARMLESS and not (saved is None and key == "data.corpora_sha256")
    ]
    if differences:
        raise InputError(f"{folder} cannot be continued by this run:\n" + "\n".join(f"  - {x}" for x in differences))
    return record
