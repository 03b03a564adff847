"""Without a GPU these tests skip."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def gpu() -> torch.device:
    """The GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, which torch does not find or `make test` hides: make test-gpu")
    return torch.device("cuda", 0)
