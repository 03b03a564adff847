"""Run by test_muon.py: three steps of Muon on matrices that ranks have parts of, against those of one process.

Every rank prints the largest difference to the weights of one process, and whether it sent as much as ``busiest`` says.
"""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from ecp_scale.config import OptimizerConfig
from ecp_scale.models.parameter_groups import OptimizerGroup
from ecp_scale.zero import muon

SHAPES = [(3, 5), (8, 10), (20, 4), (2, 2), (6, 4)]
"""Of matrices; of a tensor group the first is replicated, others are cut by rows or columns in turn."""
STEPS = 3


def share(whole: Tensor, number: int, rank: int, size: int) -> Tensor:
    """A tensor rank's share of matrix number so-and-so."""
    return whole if number == 0 else whole.chunk(size, number % 2)[rank].contiguous()


def trained(starts: list[Tensor], gradients: list[list[Tensor]], tensor: Any, data: Any) -> Tensor:
    """This rank's run of its shares after some steps, flat; a process alone has everything."""
    parameters = {}
    for number, start in enumerate(starts):
        parameter = torch.nn.Parameter(share(start, number, tensor.rank(), tensor.size()).clone())
        parameter.tensor_model_parallel = number > 0
        parameter.partition_dim = number % 2 if number else -1
        parameter.partition_stride = 1
        parameters[str(number)] = parameter
    groups = [OptimizerGroup(parameters, decays=True, orthogonal=True)]
    ranks: Any = SimpleNamespace(tensor=tensor, data=data)
    optimizer = muon.Muon(groups, OptimizerConfig(name="muon", learning_rate=0.1), ranks)
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    length = -(-len(flat) // (2 * data.size())) * 2
    mine = slice(data.rank() * length, (data.rank() + 1) * length)

    def run_of(tensors: list[Tensor]) -> Tensor:
        joined = torch.zeros(length * data.size())
        joined[: len(flat)] = torch.cat([one.flatten() for one in tensors])
        return joined[mine].clone()

    stored = run_of([parameter.detach() for parameter in parameters.values()]).requires_grad_()
    optimizer.param_groups[0]["params"] = [stored]  # as ZeRO does it
    sent = {"data": 0, "tensor": 0}
    exchange, gather = dist.all_to_all_single, dist.all_gather

    def counted_exchange(out: Tensor, given: Tensor, *more: Any, **named: Any) -> Any:
        sent["data"] += len(given)
        return exchange(out, given, *more, **named)

    def counted_gather(out: list[Tensor], given: Tensor, **named: Any) -> Any:
        sent["tensor"] += given.numel()
        return gather(out, given, **named)

    exchanged = mock.patch.object(dist, "all_to_all_single", counted_exchange)
    with exchanged, mock.patch.object(dist, "all_gather", counted_gather):
        for of_step in gradients:
            stored.grad = run_of([share(one, n, tensor.rank(), tensor.size()) for n, one in enumerate(of_step)])
            optimizer.step()
    told = torch.tensor([sent["data"], sent["tensor"]])
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    expected = muon.busiest(muon.matrices_of(groups), length, data.size())
    most = [STEPS * expected[0], STEPS * expected[1] * (tensor.size() > 1)]
    assert told.tolist() == most or data.size() * tensor.size() == 1, (told.tolist(), most)
    return stored.detach()


def main() -> None:
    """Compare all layouts of the launch."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    starts = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(STEPS)]
    alone: list[Any] = [dist.new_group([one]) for one in range(size)]
    expected_flat = trained(starts, gradients, alone[rank], alone[rank])
    places = torch.tensor([0, *(start.numel() for start in starts)]).cumsum(0).tolist()
    expected = [expected_flat[a:b].view(shape) for a, b, shape in zip(places, places[1:], SHAPES, strict=False)]
    for tensor_size in (1, 2):
        tensors: list[Any] = [
            dist.new_group(list(range(first, first + tensor_size))) for first in range(0, size, tensor_size)
        ]
        datas: list[Any] = [dist.new_group(list(range(first, size, tensor_size))) for first in range(tensor_size)]
        tensor, data = tensors[rank // tensor_size], datas[rank % tensor_size]
        found = trained(starts, gradients, tensor, data)
        whole = torch.cat([share(one, n, tensor.rank(), tensor_size).flatten() for n, one in enumerate(expected)])
        wanted = whole[data.rank() * len(found) : (data.rank() + 1) * len(found)]
        difference = (found[: len(wanted)] - wanted).abs().max().item() if len(wanted) else 0.0
        assert difference < 1e-5, difference
        assert not found[len(wanted) :].any()
    print(f"rank {rank} of {size} agrees")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
