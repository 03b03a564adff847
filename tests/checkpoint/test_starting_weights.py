"""A run that begins with the weights of an exported model."""

import json
import math
from pathlib import Path

import pytest
import torch

from ecp_scale.checkpoint.export import ExportedModel, export
from ecp_scale.checkpoint.folder import CheckpointRecord, find_checkpoint
from ecp_scale.checkpoint.weights_file import SavedWeights
from ecp_scale.command_line import parse
from ecp_scale.errors import InputError
from ecp_scale.preparation.preprocessing import preprocess
from ecp_scale.training.loop import train
from ecp_scale.zero.saved_states import SavedStates
from tests.corpus import ShardedText
from tests.launching import metrics, run_successfully
from tests.parallel.layouts import Layout, trained

SCRIPT = "launch/pretrain_ecp.py"
STILL = ("--training.steps=1", "--optimizer.learning_rate=1e-30", "--optimizer.schedule=constant")


@pytest.fixture
def folder(sharded_text: ShardedText, tmp_path: Path) -> Path:
    export(find_checkpoint(trained(Layout(), sharded_text)), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tensor=2, zero=1),
        Layout(data=2, zero=3),
        Layout(data=2, zero=1, precision="bf16"),
        Layout(data=2, zero=2, offload=True),
    ],
    ids=str,
)
def test_a_run_of_any_layout_begins_with_them(
    layout: Layout, folder: Path, sharded_text: ShardedText, tmp_path: Path
) -> None:
    options = [*layout.options(sharded_text, tmp_path / "run"), *STILL, f"--init-from={folder}"]
    run_successfully(SCRIPT, *options, ranks=layout.ranks)
    checkpoint = find_checkpoint(tmp_path / "run")
    record = CheckpointRecord.read(checkpoint)
    assert record.step == 1
    saved = SavedStates(checkpoint, record.files, record.partitions, record.tensor_parallel)
    weights = SavedWeights(folder)
    for name in record.partitions:
        # A step of nearly no length has been made.
        found = saved.weight(name, 0, math.prod(weights[name].shape))
        assert torch.equal(found, weights[name][:].flatten()), name


def test_other_data_and_geometry_go_on_from_them_and_a_resume_does_not(
    folder: Path, sharded_text: ShardedText, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*map(str, Layout().options(sharded_text, tmp_path / "run")), f"--init-from={folder}", "--resume=auto"]
    # The end of the first training had a lower loss than a beginning.
    train(parse([*words, "--training.steps=1", "--model.sequence_length=64", "--model.segment_length=8"], ""))
    first = metrics(tmp_path / "run")[0]["loss"]
    assert first < metrics(trained(Layout(), sharded_text))[0]["loss"] - 0.1
    said = capfd.readouterr().err
    assert f"start       with the weights of {folder}: step 12" in said
    train(parse([*words, "--training.steps=2", "--model.sequence_length=64", "--model.segment_length=8"], ""))
    assert "is not read: the run goes on from its own checkpoint" in capfd.readouterr().err


def test_what_does_not_fit_is_listed_before_anything_is_built(
    folder: Path, sharded_text: ShardedText, tmp_path: Path
) -> None:
    words = [*map(str, Layout().options(sharded_text, tmp_path / "run")), f"--init-from={folder}"]
    config = ExportedModel.open(folder).config
    with pytest.raises(InputError) as error:
        train(parse([*words, f"--model.layers={config.layers + 1}", "--model.bias=true"], ""))
    assert f"model.layers is {config.layers + 1}, that of the weights {config.layers}" in str(error.value)
    assert "model.bias is True, that of the weights False" in str(error.value)
    (tmp_path / "a.txt").write_text("some text " * 500)
    preprocess([str(tmp_path / "a.txt")], "byte", str(tmp_path / "bytes"))
    other = [word for word in words if not word.startswith("--data.")]
    with pytest.raises(InputError, match=r"the tokenizer of .*bytes is byte .*, that of the weights sentencepiece"):
        train(parse([*other, f"--data.prefix={tmp_path / 'bytes'}", f"--model.vocab_size={config.vocab_size}"], ""))
    with pytest.raises(InputError, match=r"nowhere/config\.json: No such file"):
        train(parse([*words[:-1], "--init-from=nowhere"], ""))
    (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), "layers": config.layers + 1})
    )
    with pytest.raises(InputError, match=r"model\.safetensors: holds [\d,]+ parameters, expected [\d,]+"):
        train(parse([*words, f"--model.layers={config.layers + 1}"], ""))
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())
