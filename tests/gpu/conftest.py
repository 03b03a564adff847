"""Without a GPU these tests skip."""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def gpu() -> torch.device:
    """The GPU."""
    if not torch.cuda.is_available():
        if "ECP_TEST_GPU" in os.environ:
            pytest.fail(f"torch {torch.__version__} finds no GPU; PYTHON=... make test-gpu takes another python")
        pytest.skip("needs a GPU, which torch does not find or `make test` hides: make test-gpu")
    return torch.device("cuda", 0)
