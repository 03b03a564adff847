"""Planted faults, each of which a model that is not what was trained must be told by."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecp_scale.checkpoint.export import ExportedModel, export
from ecp_scale.checkpoint.folder import RECORD, CheckpointRecord, find_checkpoint, signed
from ecp_scale.checkpoint.proof import Proof, prove
from ecp_scale.checkpoint.weights_file import DIGESTS, WriteOptions
from ecp_scale.errors import InputError
from ecp_scale.parallel.digests import as_text, digest
from ecp_scale.parallel.groups import Groups
from tests.corpus import ShardedText
from tests.launching import run
from tests.parallel.layouts import Layout, trained

SHARED = Layout(tensor=2, zero=1)
WEIGHTS = "model.safetensors"


def proven(folder: Path, precision: str = "fp32") -> Proof:
    exported = ExportedModel.open(folder)
    return prove(exported, exported.load(), precision)


@pytest.fixture
def folder(sharded_text: ShardedText, tmp_path: Path) -> Path:
    """An exported model."""
    export(find_checkpoint(trained(SHARED, sharded_text)), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("layout", [Layout(), SHARED, Layout(tensor=2, zero=3), Layout(data=2, zero=2)], ids=str)
@pytest.mark.parametrize("options", [WriteOptions(), WriteOptions(torch.bfloat16, file_bytes=100_000)], ids=str)
def test_a_model_is_what_was_trained(
    layout: Layout, options: WriteOptions, sharded_text: ShardedText, groups: Groups, tmp_path: Path
) -> None:
    checkpoint = find_checkpoint(trained(layout, sharded_text))
    export(checkpoint, tmp_path / "model", options)
    proof = proven(tmp_path / "model")
    assert proof.is_right, proof.lines
    loss = CheckpointRecord.read(checkpoint).probe_loss
    assert loss is not None
    assert f"{loss:.6f} in training in fp32" in proof.lines[-1]
    if options.dtype == torch.float32:
        assert abs(float(proof.lines[-1].split()[2]) - loss) < 1e-5 * loss


def change(folder: Path, fault: Callable[[dict[str, torch.Tensor]], str], known: bool = False) -> str:
    """Plant a fault in the weights; ``known``: as what wrote them would have, whose digests are those of the fault."""
    path = folder / WEIGHTS
    tensors = load_file(path)
    header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
    metadata = header["__metadata__"]
    name = fault(tensors)
    if known:
        metadata[DIGESTS] = json.dumps({key: as_text(digest(value.flatten())) for key, value in tensors.items()})
    save_file(tensors, path, metadata)
    return name


def flipped_bit(tensors: dict[str, torch.Tensor]) -> str:
    name = "layers.1.attention.output.weight"
    tensors[name].view(torch.int32)[3, 2] ^= 1 << 3
    return name


def doubled_norm(tensors: dict[str, torch.Tensor]) -> str:
    name = "norm.weight"
    tensors[name] *= 2
    return name


def untied_head(tensors: dict[str, torch.Tensor]) -> str:
    """The embedding in the place of the head."""
    tensors["output.weight"] = tensors["embedding.weight"].clone()
    return "output.weight"


@pytest.mark.parametrize("fault", [flipped_bit, doubled_norm, untied_head])
def test_a_fault_in_the_files_is_named(
    fault: Callable[[dict[str, torch.Tensor]], str], folder: Path, groups: Groups
) -> None:
    name = change(folder, fault)
    proof = proven(folder)
    assert not proof.is_right
    assert f"NOT THE SAME: parameter {name} has the digest" in proof.lines[0]
    assert "(1 of " in proof.lines[0]


@pytest.mark.parametrize("fault", [doubled_norm, untied_head])
def test_a_fault_of_what_wrote_the_files_is_seen_by_the_probe(
    fault: Callable[[dict[str, torch.Tensor]], str], folder: Path, groups: Groups
) -> None:
    change(folder, fault, known=True)
    proof = proven(folder)
    assert not proof.is_right
    assert "are what was written" in proof.lines[0]
    assert "NOT THE SAME" in proof.lines[-1]


def test_a_new_run_does_not_begin_with_a_fault(folder: Path, sharded_text: ShardedText, tmp_path: Path) -> None:
    change(folder, flipped_bit)
    options = [*Layout().options(sharded_text, tmp_path / "run"), f"--init-from={folder}"]
    done = run("launch/pretrain_ecp.py", *options)
    assert done.returncode == 2
    assert "the weights are not those that were saved: parameter layers.1.attention.output.weight" in done.stderr


def test_what_transformers_have_saved_has_no_digests(folder: Path, groups: Groups) -> None:
    path = folder / WEIGHTS
    save_file(load_file(path), path, {"format": "pt"})
    proof = proven(folder)
    assert not proof.is_right
    assert "transformers or an earlier version have written them" in proof.lines[0]


@pytest.mark.parametrize("name", ["modeling_ecp.py", "tokenizer_config.json"])
def test_code_that_is_another_one_is_named(name: str, folder: Path, groups: Groups) -> None:
    (folder / name).write_text((folder / name).read_text() + "\n")
    proof = proven(folder)
    assert not proof.is_right
    assert proof.lines[1] == f"code        NOT THE SAME: {name}"


def test_what_config_json_says_of_the_training_is_checked(folder: Path) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for name, value in {"precision": "fp16", "probe_loss": "x", "files": 3}.items():
        path.write_text(json.dumps({**content, "ecp_scale": {**content["ecp_scale"], name: value}}))
        with pytest.raises(InputError, match=r"config\.json: not an exported model"):
            ExportedModel.open(folder)
    path.write_text(json.dumps({**content, "dtype": "nn"}))
    with pytest.raises(InputError, match=r"config\.json: not an exported model"):
        ExportedModel.open(folder)


def test_ranks_that_see_different_files_agree(folder: Path, tmp_path: Path) -> None:
    """Another host may have another copy of the folder, such as one that transformers have saved."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    save_file(load_file(other / WEIGHTS), other / WEIGHTS, {"format": "pt"})
    script = (
        "import os, sys; from ecp_scale.commands.evaluate import main; "
        f"sys.argv[1:] = ['--model', ['{folder}', '{other}'][int(os.environ['RANK'])], '--verify']; main()"
    )
    (tmp_path / "verify.py").write_text(script)
    done = run(str(tmp_path / "verify.py"), ranks=2, launcher="torchrun", timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("digests     all") == 1


def test_shares_that_have_changed_places_are_named(sharded_text: ShardedText, tmp_path: Path) -> None:
    """Renamed as a whole, with a record that fits: nothing but the digests can tell."""
    run_folder = tmp_path / "run"
    checkpoint = run_folder / "checkpoints" / find_checkpoint(trained(SHARED, sharded_text)).name
    shutil.copytree(find_checkpoint(trained(SHARED, sharded_text)), checkpoint)
    content = json.loads((checkpoint / RECORD).read_text())
    files = content["files"]
    pairs = [(name, name.replace("mp_rank_00", "mp_rank_01")) for name in files if "mp_rank_00" in name]
    assert len(pairs) == 2
    for one, other in pairs:
        (checkpoint / one).rename(checkpoint / "between")
        (checkpoint / other).rename(checkpoint / one)
        (checkpoint / "between").rename(checkpoint / other)
        files[one], files[other] = files[other], files[one]
    (checkpoint / RECORD).write_text(json.dumps(signed(content)))
    with pytest.raises(InputError, match=r"not those that were saved: parameter embedding\.weight has the digest"):
        export(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    for layout in (SHARED, Layout()):
        options = [*layout.options(sharded_text, run_folder), "--training.steps=13", "--resume=auto"]
        done = run("launch/pretrain_ecp.py", *options, ranks=layout.ranks, launcher="torchrun")
        assert "Traceback" not in done.stderr.split("error: ")[0]
        assert "the weights are not those that were saved: parameter embedding.weight has the digest" in done.stderr
        assert "parameters" not in done.stdout


def test_a_file_that_the_index_does_not_name_is_missed(sharded_text: ShardedText, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export(find_checkpoint(trained(SHARED, sharded_text)), folder, WriteOptions(file_bytes=50_000))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    gone = [name for name, file in index["weight_map"].items() if file == names[1]]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != names[1]}
    path.write_text(json.dumps(index))
    done = run("launch/evaluate.py", "--model", folder, "--verify")
    assert done.returncode == 2
    assert "does not fit the model" in done.stderr
    assert all(f"{name} is missing" in done.stderr for name in gone)


def test_the_program_says_so_and_ends_with_code_1(folder: Path) -> None:
    done = run("launch/evaluate.py", "--model", folder, "--verify", ranks=2, launcher="torchrun")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("digests     all") == done.stdout.count("probe       loss") == 1
    done = run("launch/evaluate.py", "--model", folder, "--verify", "--segment-length", 8)
    assert done.returncode == 2
    assert "error: --segment-length does nothing with --verify; leave it out" in done.stderr
    name = change(folder, flipped_bit)
    done = run("launch/evaluate.py", "--model", folder, "--verify", "--parallel.tensor", 2, ranks=2)
    assert done.returncode == 1
    assert f"parameter {name} has the digest" in done.stdout
