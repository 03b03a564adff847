"""What every field of the config does to a resume, in the same layout and in another one."""

import copy
import dataclasses
import hashlib
import math
import re
import shutil
from pathlib import Path

import pytest

from ecp_scale.checkpoint.folder import CheckpointRecord, find_checkpoint
from ecp_scale.checkpoint.identity import check_continues
from ecp_scale.command_line import parse
from ecp_scale.config.options import SECTIONS
from ecp_scale.config.resume import FIXED, MAY_CHANGE, NEVER_MATTERS, rule
from ecp_scale.errors import InputError
from ecp_scale.training.loop import train
from ecp_scale.zero.saved_states import SavedStates
from tests.corpus import ShardedText
from tests.launching import metrics
from tests.parallel.layouts import Layout

FIELDS = [f"{section}.{item.name}" for section, kind in SECTIONS.items() for item in dataclasses.fields(kind)]
CHANGES = {
    "model.dropout": 0.5,
    "model.sequence_length": 128,
    "model.segment_length": 32,
    "data.loss_ignore_ids": str(list(range(259, 330))),
    "optimizer.learning_rate": 1e-3,
    "optimizer.beta1": 0.5,
    "optimizer.beta2": 0.5,
    "optimizer.epsilon": 1e-2,
    "optimizer.weight_decay": 0.9,
    "optimizer.gradient_clipping": 0.01,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_tokens": 1024,
    "training.global_batch_size": 8,
    "training.batch_schedule": "{512: 8}",
    "training.z_loss": 0.1,
}
"""What takes effect from the next step on."""
WITH_OTHERS = {
    "data.blend": "tests/training/test_runs.py: a blend that changes in mid-run",
    "model.latents": "of architectures that have them: tests/training/test_runs.py, another geometry",
    "model.window": "the same",
    "model.group_length": "the same",
    "optimizer.decay_tokens": "only under cosine, which is tested",
    "optimizer.min_lr_ratio": "only under cosine, which is tested",
    "optimizer.halving_tokens": "only under halving",
    "optimizer.momentum": "only of muon: tests/zero/test_changed_optimizer.py",
    "optimizer.average_decay": "changes no weight: tests/zero/test_averaging.py",
    "optimizer.cooldown_tokens": "only under wsd: tests/test_learning_rate.py",
    "training.steps": "every resume here",
    "training.skip_samples": "tests/training/test_spikes.py",
    "training.tokens": "the same as the steps: tests/training/test_batch_schedule.py",
    "training.precision": "tests/parallel: layouts",
    "training.compile": "equal up to rounding: tests/models",
    "training.tf32": "rounds products on a GPU alone",
    "training.flash_attention": "equal up to rounding, and on a GPU alone: tests/attention/test_kernels.py",
    "training.micro_batch_size": "equal up to rounding: tests/parallel",
    "attention.backend": "equal up to rounding: tests/attention",
    "parallel.tensor": "tests/training/test_runs.py: other ranks",
    "parallel.context": "the same",
    "parallel.sequence": "the same",
    "parallel.recompute": "tests/parallel: layouts",
}
"""What may change and is tested elsewhere, or has no effect by itself."""
WITHOUT_EFFECT = {
    "logging.profile_steps": "[5,5]",
    "model.allow_short_receptive_field": True,
    "parallel.timeout_seconds": 300,
    "training.validation_every_steps": 1,
    "training.validation_windows": 3,
    "training.max_skipped_steps": 2,
    "training.spike_score": 2.0,
    "training.on_spike": "roll_back",
    "training.spike_skip_steps": 3,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.asynchronous": True,
    "checkpoint.on_failed_save": "continue",
    "logging.wandb_project": "other",
    "logging.run_name": "other",
    "logging.every_steps": 7,
    "logging.peak_teraflops": 3.0,
}
UNSET = {
    "model.preset",
    "data.prefix",
    "data.validation_prefix",
    "data.validation",
    "training.output_dir",
    "checkpoint.mirror",
    "checkpoint.keep_every",
    "logging.wandb",
    "logging.tensorboard",
}
"""Names of files and folders, which every run here has others of; what needs another field, see tests/checkpoint; and
trackers, see test_trackers.py."""


def options(text: ShardedText, run: Path, steps: int, zero: int, *changes: str) -> list[str]:
    """A run of few steps with one update rule per step."""
    words = [*Layout(zero=zero).options(text, run), "--optimizer.schedule=constant", "--optimizer.warmup_tokens=0"]
    return [*map(str, words), "--resume=auto", "--allow-rate-jump", f"--training.steps={steps}", *changes]


@pytest.fixture(scope="module")
def saved(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after two steps under ZeRO-1."""
    run = tmp_path_factory.mktemp("table") / "run"
    train(parse(options(sharded_text, run, 2, zero=1), ""))
    return run


def after_one_more(saved: Path, text: ShardedText, folder: Path, zero: int, *changes: str) -> str:
    """Digest of the weights after a resume with some changes and one more step."""
    run = folder / f"run-{zero}-{len(list(folder.iterdir()))}"
    shutil.copytree(saved, run)
    train(parse(options(text, run, 3, zero, *changes), ""))
    checkpoint = find_checkpoint(run)
    assert checkpoint.name == "step-00000003"
    assert metrics(run)[-1]["step"] == 3
    digest = hashlib.sha256()
    record = CheckpointRecord.read(checkpoint)
    states = SavedStates(checkpoint, record.files, record.partitions, record.tensor_parallel)
    for name in record.partitions:
        # Layouts add up in other orders: what is compared between them is rounded.
        weight = states.weight(name, 0, math.prod(states.shape(name)))
        digest.update(name.encode() + (weight * 2**16).round().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def unchanged(saved: Path, sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of a resume that changes nothing."""
    return after_one_more(saved, sharded_text, tmp_path_factory.mktemp("unchanged"), 1)


def test_every_field_has_a_rule_that_is_tested() -> None:
    tested = {MAY_CHANGE: {*CHANGES, *WITH_OTHERS}, NEVER_MATTERS: {*WITHOUT_EFFECT, *UNSET}}
    for field in FIELDS:
        assert rule(field) == FIXED or field in tested[rule(field)], f"{field}: {rule(field)}, but no test"
    for kind, fields in tested.items():
        assert {rule(field) for field in fields} == {kind}, kind
        assert fields <= set(FIELDS)


@pytest.mark.parametrize("field", [field for field in FIELDS if rule(field) == FIXED])
def test_what_is_fixed_is_refused_by_name(field: str, saved: Path) -> None:
    record = CheckpointRecord.read(find_checkpoint(saved))
    section, name = field.split(".")
    where = "data" if field == "training.seed" else section
    now = {key: copy.deepcopy(getattr(record, key)) for key in ("model", "attention", "optimizer", "data")}
    check_continues(record, saved, now)
    assert name in now[where]
    record.__dict__[where] = {**now[where], name: "another"}
    with pytest.raises(InputError, match=rf"{re.escape(field)} was 'another' and is now"):
        check_continues(record, saved, now)


@pytest.mark.parametrize("field", CHANGES)
def test_what_may_change_takes_effect_alike_in_both_kinds_of_resume(
    field: str, saved: Path, unchanged: str, sharded_text: ShardedText, tmp_path: Path
) -> None:
    same, other = (
        after_one_more(saved, sharded_text, tmp_path, zero, f"--{field}={CHANGES[field]}") for zero in (1, 2)
    )
    assert same != unchanged
    assert same == other


def test_what_never_matters_changes_no_bit(
    saved: Path, unchanged: str, sharded_text: ShardedText, tmp_path: Path
) -> None:
    changes = [f"--{field}={value}" for field, value in WITHOUT_EFFECT.items()]
    assert after_one_more(saved, sharded_text, tmp_path, 1, *changes) == unchanged
    assert after_one_more(saved, sharded_text, tmp_path, 2, *changes) == unchanged


def test_a_record_of_an_earlier_version_has_no_optimizer_and_is_continued(saved: Path) -> None:
    record = CheckpointRecord.read(find_checkpoint(saved))
    now = {key: getattr(record, key) for key in ("model", "attention", "optimizer", "data")}
    check_continues(dataclasses.replace(record, optimizer={}), saved, now)
