"""Checkpoints of every layout become one model folder, equal to what the trainer held."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from ecp_scale.checkpoint.export import WRITTEN, ExportedModel, export
from ecp_scale.checkpoint.folder import find_checkpoint
from ecp_scale.checkpoint.proof import prove
from ecp_scale.checkpoint.weights_file import WriteOptions
from ecp_scale.errors import InputError
from ecp_scale.parallel.groups import Groups
from tests.corpus import ShardedText
from tests.parallel.layouts import BF16, CONVERTED, LAUNCH_SECONDS, MORE_CONVERTED, Layout, trained
from tests.parallel.train_layouts import LOGITS, probe_tokens

EXHAUSTIVE = [pytest.mark.exhaustive, pytest.mark.timeout(LAUNCH_SECONDS)]


@pytest.fixture(params=[*CONVERTED, *(pytest.param(layout, marks=EXHAUSTIVE) for layout in MORE_CONVERTED)], ids=str)
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


def test_the_converted_model_has_the_trainers_logits(
    layout: Layout, sharded_text: ShardedText, groups: Groups, tmp_path: Path
) -> None:
    run = trained(layout, sharded_text)
    trainers = torch.from_numpy(np.load(run / LOGITS))
    output = tmp_path / "model"
    export(find_checkpoint(run), output)
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.model", "modeling_ecp.py", "README.md"}
    assert all(WRITTEN.fullmatch(name) for name in names)
    exported = ExportedModel.open(output)
    dtype = torch.bfloat16 if layout.precision == "bf16" else torch.float32
    model = exported.load(dtype)
    with torch.no_grad():
        logits = model.logits(probe_tokens()).float()
    # Ranks that share a sequence hold a run of it each; the first has written its own.
    logits = logits[:, : trainers.shape[1]] if layout.context > 1 else logits
    tolerance = 0.05 if layout.precision == "bf16" else 1e-5
    assert_close(logits, trainers, rtol=tolerance, atol=tolerance)
    assert logits.shape[-1] == exported.tokenizer.vocab_size
    assert (proof := prove(exported, exported.load(), "fp32")).is_right, proof.lines


@pytest.mark.parametrize("layout", BF16, ids=str)
def test_master_weights_are_exported_in_fp32(layout: Layout, sharded_text: ShardedText, tmp_path: Path) -> None:
    export(find_checkpoint(trained(layout, sharded_text)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())


@pytest.fixture
def model_folder(sharded_text: ShardedText, tmp_path: Path) -> Path:
    export(find_checkpoint(trained(Layout(), sharded_text)), tmp_path)
    return tmp_path


def test_a_model_folder_of_the_format_before_is_read_and_may_be_exported_again(
    model_folder: Path, sharded_text: ShardedText
) -> None:
    path = model_folder / "config.json"
    config = json.loads(path.read_text())
    present = ExportedModel.open(model_folder)
    model, attention = dataclasses.asdict(present.config), dataclasses.asdict(present.attention)
    model["allow_short_reach"] = model.pop("allow_short_receptive_field")
    attention["backend"] = "merged"
    others = {name: config["ecp_scale"][name] for name in ("tokenizer", "step", "tokens")}
    former_content = {"format": "ecp-scale", "format_version": 2, "model": model, "attention": attention, **others}
    path.write_text(json.dumps(former_content))
    former = ExportedModel.open(model_folder)
    assert former.config == present.config
    assert former.attention == dataclasses.replace(present.attention, backend="flash")
    export(find_checkpoint(trained(Layout(), sharded_text)), model_folder)
    assert json.loads(path.read_text())["ecp_scale"]["format_version"] == 4


def test_a_model_of_another_type_is_not_written_over(model_folder: Path, sharded_text: ShardedText) -> None:
    checkpoint = find_checkpoint(trained(Layout(), sharded_text))
    export(checkpoint, model_folder)
    with pytest.raises(InputError, match="holds this model in float32, not bfloat16; choose a new folder"):
        export(checkpoint, model_folder, WriteOptions(torch.bfloat16))


def test_another_tokenizer_beside_the_model_is_refused(model_folder: Path) -> None:
    path = model_folder / "tokenizer.model"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"tokenizer\.model has sha256 .* but the model was trained with"):
        ExportedModel.open(model_folder)


def test_damaged_model_folders_are_named(model_folder: Path, groups: Groups) -> None:
    with pytest.raises(InputError, match=r"nowhere/config\.json: No such file"):
        ExportedModel.open(model_folder / "nowhere")
    exported = ExportedModel.open(model_folder)
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        exported.load()
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(InputError, match=r"a model of the kind 'llama', expected one of ecp-convert"):
        ExportedModel.open(model_folder)
    (model_folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="a model of the kind 'llama'"):
        ExportedModel.open(model_folder)
    (model_folder / "config.json").write_text(json.dumps({**config, "ecp_scale": {"format_version": 9}}))
    with pytest.raises(InputError, match=r"format version 9, expected one of \(2, 3, 4\)"):
        ExportedModel.open(model_folder)
