"""DeepSpeed's optimizers with fewer kernels and waits.

Under ZeRO-1 in bf16 it runs four kernels for each parameter and step. A model has hundreds of parameters, and a kernel
costs the host ten microseconds or more. Here one is left for each, which adds bf16 to float32, and a few for all. The
numbers stay the same but for the order in which a norm is summed.
"""

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, mask_nan_or_inf_with_val_inplace
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor
from torch.distributed import ProcessGroup


def use_few_kernels(optimizer: BF16_Optimizer) -> None:
    """Let gradients of many parameters be added, measured and clipped at once."""
    assert not optimizer.immediate_grad_update
    assert not optimizer.has_moe_layers
    assert optimizer.mpu is not None
    step = optimizer.step

    def with_few_kernels(*arguments: Any, **named: Any) -> Any:
        ours = {"get_global_norm_of_tensors": _norm, "clip_tensors_by_global_norm": _clip}
        before = {name: getattr(bf16_optimizer, name) for name in ours}
        try:
            vars(bf16_optimizer).update(ours)
            return step(*arguments, **named)
        finally:
            vars(bf16_optimizer).update(before)

    optimizer.update_hp_grads = MethodType(_add_gradients, optimizer)
    optimizer.step = with_few_kernels


def wait_once_for_norm(optimizer: Any) -> None:
    """Have ZeRO-2 and -3 take the gradient norm to the host once; they would ask the device for it at every use.

    That a gradient is not finite is in the norm, so that it is not looked for beside it.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        norms = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: [_on_host(combine_grad_norm_groups(norms()))]
        return
    norm = optimizer.scaled_global_norm
    optimizer.scaled_global_norm = lambda *arguments, **named: _on_host(norm(*arguments, **named))
    if not optimizer.cpu_offload:
        optimizer.check_overflow = lambda *arguments, **named: None


def _on_host(norm: Tensor) -> Tensor:
    return torch.tensor(norm.item(), dtype=torch.float32)


@torch.no_grad()
def _add_gradients(self: BF16_Optimizer, clear_lp_grads: bool = False) -> None:
    """Add what a backward pass has found, in bf16, to what the step has, in float32."""
    of_groups = zip(self.bf16_groups, self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True)
    for parameters, sums, has_gradients in of_groups:
        found = [(number, parameter) for number, parameter in enumerate(parameters) if parameter.grad is not None]
        if not found:
            continue
        gradients = [parameter.grad for _, parameter in found]
        torch._foreach_add_([sums[number] for number, _ in found], [gradient.view(-1) for gradient in gradients])
        for number, parameter in found:
            parameter._hp_grad = sums[number]
            has_gradients[number] = True
        if clear_lp_grads:
            torch._foreach_zero_(gradients)


def norm_over(tensors: list[Tensor], group: ProcessGroup, device: torch.device) -> Tensor:
    """The norm of the tensors of all ranks of a group, on a device."""
    square = torch.nn.utils.get_total_norm(tensors).square().to(device)
    dist.all_reduce(square, group=group)
    return square.sqrt()


def _norm(input_tensors: list[Tensor], norm_type: float = 2, mpu: Any = None, moe_ep_group: Any = None) -> Tensor:
    """The norm over tensors of the ranks of a model; -1 where it is no number, as DeepSpeed has it."""
    assert norm_type == 2
    assert moe_ep_group is None
    device = torch.device(get_accelerator().current_device_name())
    norm = norm_over(input_tensors, mpu.get_model_parallel_group(), device)
    mask_nan_or_inf_with_val_inplace(norm, device=norm.device)
    return _on_host(norm)


def _clip(input_tensors: list[Tensor], max_norm: float = 1.0, global_norm: Any = None, mpu: Any = None) -> None:
    """Scale tensors so that their norm, ``global_norm`` until now, is ``max_norm`` at most."""
    share = max_norm / (global_norm + 1e-6)
    if share < 1:
        torch._foreach_mul_(input_tensors, share)
