"""Files of a checkpoint that are not as they were written."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from ecp_scale.checkpoint.export import export
from ecp_scale.checkpoint.folder import RECORD, CheckpointRecord, find_checkpoint, signed
from ecp_scale.checkpoint.weights_file import WriteOptions
from ecp_scale.errors import InputError
from ecp_scale.zero.state_files import FileRecord, damages, read_states, write_states
from tests.corpus import ShardedText
from tests.launching import run, run_successfully
from tests.parallel.layouts import Layout

RANGES = 50
LAYOUT = Layout(data=2, zero=1, settings="paper")


@pytest.fixture(scope="module")
def checkpoint(sharded_text: ShardedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks."""
    output = tmp_path_factory.mktemp("written") / "run"
    run_successfully("launch/pretrain_ecp.py", *LAYOUT.options(sharded_text, output), "--training.steps=3", ranks=2)
    return find_checkpoint(output)


def test_any_range_of_any_file_that_is_damaged_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, folder)
    record = CheckpointRecord.read(folder)
    assert damages(folder, record.files) == []
    assert len(record.files) == 4
    draw = random.Random(1)
    for number in range(RANGES):
        name = sorted(record.files)[number % len(record.files)]
        path = folder / name
        content = path.read_bytes()
        length = draw.randint(1, min(4096, len(content)))
        start = draw.randrange(len(content) - length + 1)
        # Zeros, as a lost block of a disk has, or noise; where neither would change anything, noise does.
        noise = bytes(byte ^ draw.randint(1, 255) for byte in content[start : start + length])
        damage = bytes(length) if number % 2 and any(content[start : start + length]) else noise
        path.write_bytes(content[:start] + damage + content[start + length :])
        CheckpointRecord.read(folder)  # of the same size, so nothing else could tell
        (found,) = damages(folder, record.files)
        assert found.startswith(f"{path} is damaged: its {len(content)} bytes")
        path.write_bytes(content)
    assert damages(folder, record.files) == []


def test_a_record_that_is_not_what_was_written_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, folder)
    content = json.loads((folder / RECORD).read_text())
    for key, value in (("tokens", 90), ("step", 4), ("data_digest", "0" * 16), ("run_tokens", 1), ("xxh3", "0" * 32)):
        (folder / RECORD).write_text(json.dumps({**content, key: value}))
        with pytest.raises(InputError, match=r"checkpoint\.json: is damaged: it is not what was written"):
            CheckpointRecord.read(folder)
    files = {name: {**file, "xxh3": ""} for name, file in content["files"].items()}
    (folder / RECORD).write_text(json.dumps(signed({**content, "files": files})))
    with pytest.raises(InputError, match="has no hash of"):
        CheckpointRecord.read(folder)
    (folder / RECORD).write_text(json.dumps(content))
    draw = random.Random(2)
    raw = (folder / RECORD).read_bytes()
    for _ in range(RANGES):
        start = draw.randrange(len(raw) - 1)
        length = draw.randint(1, min(4096, len(raw) - start))
        (folder / RECORD).write_bytes(raw[:start] + bytes(length) + raw[start + length :])
        with pytest.raises(InputError, match=r"checkpoint\.json"):
            CheckpointRecord.read(folder)


def test_a_conversion_of_a_damaged_checkpoint_is_refused_or_right(checkpoint: Path, tmp_path: Path) -> None:
    """It reads the weights alone: what is damaged of the moments is not of the model."""
    folder, draw = tmp_path / checkpoint.name, random.Random(4)
    export(checkpoint, tmp_path / "right")
    right = (tmp_path / "right" / "model.safetensors").read_bytes()
    shutil.copytree(checkpoint, folder)
    path = next(path for path in folder.iterdir() if path.name.endswith("_optim_states.pt"))
    content = path.read_bytes()
    refusals = 0
    for _ in range(RANGES):
        flipped, place = bytearray(content), draw.randrange(len(content))
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            export(folder, tmp_path / "model")
        except InputError as error:
            refusals += 1
            assert f"{path.name} is damaged" in str(error) or str(path) in str(error)  # noqa: PT017
            assert not (tmp_path / "model").exists()
        else:
            assert (tmp_path / "model" / "model.safetensors").read_bytes() == right
            shutil.rmtree(tmp_path / "model")
    assert 0.1 < refusals / RANGES < 0.9


def test_a_damaged_checkpoint_is_not_resumed(checkpoint: Path, sharded_text: ShardedText, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, folder)
    path = next(path for path in folder.iterdir() if path.name.endswith("_optim_states.pt"))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    path.write_bytes(content)
    verified = run("launch/checkpoint.py", "verify", tmp_path / "run")
    assert verified.returncode == 1
    assert f"{path} is damaged" in verified.stdout
    words = [
        *Layout(zero=1, settings="paper").options(sharded_text, tmp_path / "run"),
        "--resume=auto",
        "--allow-rate-jump",
    ]
    resumed = run("launch/pretrain_ecp.py", *words)
    assert resumed.returncode == 2
    assert f"error: {path} is damaged" in resumed.stderr


class Planted:
    """Runs a command when it is loaded by pickle."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch planted",)


def test_nothing_that_a_file_holds_is_run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, folder)
    path = folder / "mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=False)
    torch.save({**states, "planted": Planted()}, path)
    content = json.loads((folder / RECORD).read_text())
    content["files"][path.name] = FileRecord.of(path)._asdict()
    (folder / RECORD).write_text(json.dumps(signed(content)))
    with pytest.raises(InputError, match=r"mp_rank_00_model_states\.pt: holds what is not loaded: .*posix\.system"):
        export(folder, tmp_path / "model")
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/b", "..", ""])
def test_names_in_a_record_are_plain_names(checkpoint: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, folder)
    content = json.loads((folder / RECORD).read_text())
    file = content["files"].pop("mp_rank_00_model_states.pt")
    (folder / RECORD).write_text(json.dumps(signed({**content, "files": {**content["files"], name: file}})))
    with pytest.raises(InputError, match="expected a plain name in its own folder"):
        CheckpointRecord.read(folder)
    if name:
        (folder / RECORD).write_text(json.dumps(signed({**content, "tokenizer_file": name})))
        with pytest.raises(InputError, match="expected a plain name in its own folder"):
            CheckpointRecord.read(folder)


@pytest.mark.parametrize("ending", ["_optim_states.pt", "_model_states.pt"])
def test_a_record_that_lacks_the_file_of_a_rank_is_not_complete(checkpoint: Path, tmp_path: Path, ending: str) -> None:
    folder = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, folder)
    content = json.loads((folder / RECORD).read_text())
    content["files"].pop(next(name for name in content["files"] if name.endswith(ending)))
    (folder / RECORD).write_text(json.dumps(signed(content)))
    with pytest.raises(InputError, match=r"lists \d files \*_\w+_states\.pt, expected \d of 2 ranks"):
        CheckpointRecord.read(folder)


def test_the_error_of_a_full_disk_is_that_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        write_states({"weight": torch.zeros(10_000)}, Path("/dev/full"))
    with pytest.raises(InputError, match=r"nothing\.pt: No such file"):
        read_states(tmp_path / "nothing.pt")


def test_an_export_is_readable_as_the_umask_says_and_replaces_no_other_model(checkpoint: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export(checkpoint, tmp_path / "model")
    finally:
        os.umask(before)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o640
    export(checkpoint, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    ours = {**config["ecp_scale"], "step": 99}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "ecp_scale": ours}))
    with pytest.raises(InputError, match=r"holds another model \(step 99"):
        export(checkpoint, tmp_path / "model")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thoughts.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds thoughts\.txt; choose a new folder"):
        export(checkpoint, tmp_path / "notes")
    with pytest.raises(InputError, match="is a file, expected a new folder"):
        export(checkpoint, tmp_path / "notes" / "thoughts.txt")
    assert (tmp_path / "notes" / "thoughts.txt").read_text() == "mine"


def test_an_export_that_fails_half_way_goes_on_where_it_was(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("ecp_scale.checkpoint.export.write_tokenizer", fail)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\), [\d,]+ bytes are free"):
        export(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    partial = tmp_path / ".model.partial"
    weights = partial / "model.safetensors"
    (partial / "model.safetensors.tmp").write_bytes(b"cut short")
    before = weights.stat().st_mtime_ns
    with (
        FileLock(tmp_path / ".model.partial.lock"),
        pytest.raises(InputError, match="another conversion is writing it"),
    ):
        export(checkpoint, tmp_path / "model")
    monkeypatch.undo()
    # The same conversion goes on; one to another type begins anew.
    export(checkpoint, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"of another")
    export(checkpoint, tmp_path / "other", WriteOptions(torch.bfloat16))
    assert (tmp_path / "other" / "model.safetensors").stat().st_size < weights_size(tmp_path / "model")


def weights_size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size
