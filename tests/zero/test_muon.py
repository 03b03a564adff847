"""Muon: what it computes, and for which parameters."""

import pytest
import torch

from ecp_scale.config import OptimizerConfig
from ecp_scale.models.parameter_groups import OptimizerGroup, optimizer_groups
from ecp_scale.parallel.groups import Groups
from ecp_scale.zero.muon import Muon, orthogonal
from tests.launching import run_successfully
from tests.models.settings import SCALED, build


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_an_update_has_the_directions_of_the_momentum_and_equal_lengths(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, lengths, right = torch.linalg.svd(matrix, full_matrices=False)
    assert lengths.max() / lengths.min() > 2
    found = left.T @ orthogonal(matrix) @ right.T
    assert found.diagonal().min() > 0.6
    assert found.diagonal().max() < 1.3
    assert (found - found.diagonal().diag()).abs().max() < 1e-4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
def test_steps_are_those_of_torch(groups: Groups) -> None:
    generator = torch.Generator().manual_seed(2)
    starts = [torch.randn(shape, generator=generator) for shape in ((12, 30), (30, 12))]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    config = OptimizerConfig(name="muon", learning_rate=0.02, weight_decay=0.1)
    named = {str(number): parameter for number, parameter in enumerate(ours)}
    mine = Muon([OptimizerGroup(named, decays=True, orthogonal=True)], config, groups)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, another in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            another.grad = one.grad.clone()
        mine.step()
        other.step()
    for one, another, start in zip(ours, theirs, starts, strict=True):
        # torch multiplies in bf16.
        torch.testing.assert_close(one - start, another - start, rtol=0.05, atol=0.02 * (one - start).std().item())


def test_it_has_the_matrices_of_the_blocks_and_adamw_all_else(groups: Groups) -> None:
    model = build(SCALED, groups)
    optimizer = Muon(optimizer_groups(model, "muon"), OptimizerConfig(name="muon"), groups)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        of_muon = parameter.dim() == 2 and name.startswith("layers.")
        expected = {"step", "momentum_buffer"} if of_muon else {"step", "exp_avg", "exp_avg_sq"}
        assert optimizer.state[parameter].keys() == expected, name


def test_ranks_with_parts_of_matrices_compute_what_one_process_does() -> None:
    out = run_successfully("tests/zero/muon_ranks.py", ranks=4)
    assert [f"rank {rank} of 4 agrees" in out for rank in range(4)] == [True] * 4
