"""The paper's models equal the authors' release under tensor parallelism, and parity.py can fail."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.launching import run


@pytest.mark.parametrize("tensor", [1, 2, 3])
def test_logits_loss_and_every_gradient_equal_the_release(tensor: int, golden: Path) -> None:
    files = sorted(golden.parent.glob("*.safetensors"))
    assert len(files) == 5
    done = run("tests/parity.py", *files, "--tp", tensor)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{file.name}  tp {tensor}" in done.stdout for file in files)


def test_a_wrong_number_is_found(golden: Path, tmp_path: Path) -> None:
    with safe_open(golden, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    wrong = tensors["grad/layers.0.0.fn.to_out_0.weight"]
    wrong += 1e-3 * wrong.abs().max() * torch.ones_like(wrong)
    save_file(tensors, tmp_path / "wrong.safetensors", metadata)
    assert run("tests/parity.py", tmp_path / "wrong.safetensors").returncode == 1


def test_bad_files_are_named(tmp_path: Path) -> None:
    done = run("tests/parity.py", tmp_path / "nothing.safetensors")
    assert done.returncode == 2
    assert "nothing.safetensors does not exist" in done.stderr
