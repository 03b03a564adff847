"""Weights in the safetensors format, as the library reads them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecp_scale.checkpoint import weights_file
from ecp_scale.checkpoint.weights_file import INDEX, WEIGHTS, SavedWeights, WriteOptions, write_weights
from ecp_scale.errors import InputError
from tests.launching import ROOT, environment

TENSORS = {"b.weight": torch.randn(5, 7), "a.weight": torch.randn(3), "c.bias": torch.randn(2, 2, 3)}


def write(folder: Path, dtype: torch.dtype = torch.float32, file_bytes: int = 10**9) -> None:
    shapes = {name: tensor.shape for name, tensor in TENSORS.items()}
    read = lambda name, start, stop: TENSORS[name].flatten()[start:stop]  # noqa: E731
    write_weights(folder, shapes, read, WriteOptions(dtype, file_bytes, workers=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [4, 1 << 24])
def test_one_file_is_what_the_library_would_have_written(
    dtype: torch.dtype, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_file, "PIECE", piece)
    write(tmp_path, dtype)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    for found in (load_file(tmp_path / WEIGHTS), SavedWeights(tmp_path)):
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name][:], TENSORS[name].to(dtype)) for name in TENSORS)


def test_several_files_have_an_index_and_none_is_larger_than_asked(tmp_path: Path) -> None:
    write(tmp_path, file_bytes=100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * (35 + 3 + 12)
    assert set(index["weight_map"]) == TENSORS.keys()
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    loaded = {name: tensor for file in names for name, tensor in load_file(tmp_path / file).items()}
    read = SavedWeights(tmp_path)
    assert len(read) == 3
    assert all(
        torch.equal(loaded[name], TENSORS[name]) and torch.equal(read[name][:], TENSORS[name]) for name in TENSORS
    )
    (tmp_path / names[1]).unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: cannot be read"):
        SavedWeights(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(InputError, match=r"index\.json: cannot be read"):
        SavedWeights(tmp_path)


def test_files_that_are_there_are_left_where_they_are_whole(tmp_path: Path) -> None:
    """As a conversion that goes on finds them."""
    write(tmp_path, file_bytes=100)
    files = sorted(tmp_path.glob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in files]
    right = [path.read_bytes() for path in files]
    write(tmp_path, file_bytes=100)
    assert [path.stat().st_mtime_ns for path in files] == before
    files[0].write_bytes(right[0][:-1] + bytes([right[0][-1] ^ 1]))
    save_file(load_file(files[1]), files[1], {"format": "pt"})
    write(tmp_path, file_bytes=100)
    assert [path.read_bytes() for path in files] == right


def test_a_disk_that_is_full_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / f"{WEIGHTS}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path)


LARGE = """
import resource, sys, torch
from pathlib import Path
from ecp_scale.checkpoint.weights_file import WriteOptions, write_weights
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_weights(
    Path(sys.argv[1]), {"large": [1 << 28]}, lambda name, a, b: torch.ones(b - a), WriteOptions(torch.bfloat16)
)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_gigabyte_is_written_in_little_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LARGE, tmp_path], env=environment(), capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (tmp_path / WEIGHTS).stat().st_size > 1 << 29
    assert int(done.stdout) < 200e6


def test_one_file_beside_files_of_an_index_is_the_model_where_those_are_gone(tmp_path: Path) -> None:
    """As transformers leave a folder that they save into."""
    write(tmp_path, file_bytes=100)
    write(tmp_path)
    with pytest.raises(InputError, match=r"holds model\.safetensors and the files of model\.safetensors\.index\.json"):
        SavedWeights(tmp_path)
    for path in tmp_path.glob("model-*"):
        path.unlink()
    assert SavedWeights(tmp_path).path.name == WEIGHTS
