"""The groups of a launch."""

from datetime import timedelta

import pytest
import torch

from ecp_scale.config import ParallelConfig
from ecp_scale.parallel.groups import process_groups


@pytest.mark.parametrize("seconds", [16, 90])
def test_every_group_waits_as_long_as_the_config_says(seconds: int) -> None:
    """Megatron-core counts in minutes."""
    with process_groups(ParallelConfig(timeout_seconds=seconds)) as groups:
        for group in (groups.tensor, groups.context, groups.replicas, groups.data):
            options = group._get_backend(torch.device("cpu")).options
            assert options._timeout == timedelta(seconds=seconds)
