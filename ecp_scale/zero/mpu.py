"""The seam between DeepSpeed and Megatron-core: what DeepSpeed calls an ``mpu``, answered by Megatron's groups.

DeepSpeed asks for get_model_parallel_* and get_data_parallel_*; Megatron-core has get_tensor_model_parallel_* and
several data-parallel groups. tests/zero/test_mpu.py checks this class against every ``mpu.`` access of the
installed DeepSpeed.
"""

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ecp_scale.parallel.megatron import parallel_state


class ModelParallelUnit:
    """Megatron-core's process groups under the names that DeepSpeed calls."""

    def get_model_parallel_group(self) -> ProcessGroup:
        """Ranks that share one replica of the model: overflow and gradient norm are summed over it."""
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_rank(self) -> int:
        """This rank's place in a replica; checkpoint files are named by it."""
        return dist.get_rank(self.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        """Ranks of a replica."""
        return dist.get_world_size(self.get_model_parallel_group())

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        """Ranks that share every matrix."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank's share of every matrix."""
        return parallel_state.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        """Number of shares of every matrix."""
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first member of the tensor group."""
        return parallel_state.get_tensor_model_parallel_src_rank()

    def get_data_parallel_group(self) -> ProcessGroup:
        """Ranks over which gradients are averaged and ZeRO partitions: replicas times context parallelism."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        """This rank's number among those over which gradients are averaged."""
        return dist.get_rank(self.get_data_parallel_group())

    def get_data_parallel_world_size(self) -> int:
        """Number of ranks over which gradients are averaged."""
        return dist.get_world_size(self.get_data_parallel_group())

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks over which gradients are averaged."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_pipeline_model_parallel_group(self) -> ProcessGroup:
        """Pipeline parallelism is not used: a group of one."""
        return parallel_state.get_pipeline_model_parallel_group()

    def get_pipeline_model_parallel_rank(self) -> int:
        """Pipeline parallelism is not used: 0."""
        return parallel_state.get_pipeline_model_parallel_rank()

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Pipeline parallelism is not used: 1."""
        return parallel_state.get_pipeline_model_parallel_world_size()
