"""Train an ECP language model.

    deepspeed --num_gpus 8 launch/pretrain_ecp.py --config FILE [--section.key value ...] \\
        [--deepspeed_config ds_configs/zero1.json] [--resume auto] [--dry-run]

Under `srun` with a task per rank, the same without a launcher. SIGTERM, SIGINT, SIGHUP and SIGUSR1 save and stop, and
so does a file `stop` in the run folder.
"""

import os
import sys
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from ecp_scale.cluster.ranks import adopt_launcher
from ecp_scale.cluster.signals import StopRequest
from ecp_scale.command_line import Request, parse, to_yaml
from ecp_scale.console import quiet, say, waiting
from ecp_scale.errors import InputError, input_errors_exit, is_first_rank


def describe(request: Request) -> str:
    """The resolved config and what it counts."""
    config = request.config
    model = config.model
    lines = [to_yaml(config)]
    if model.vocab_size is None:
        lines += ["parameters          unknown until the tokenizer is (model.vocab_size is null)"]
    else:
        lines += [
            f"parameters          {model.parameters:,}",
            f"FLOPs per token     {model.flops_per_token:,.0f} (forward and backward)",
        ]
    lines += [
        f"trained positions   the last {model.geometry.trained_positions:,} of {model.sequence_length:,}",
        f"receptive field     {model.geometry.receptive_field_formula}",
        f"tokens per step     {config.tokens_per_step:,}",
        f"tokens of the run   {config.tokens_after(config.training.steps):,}",
    ]
    return "\n".join(lines)


@input_errors_exit()
def main() -> None:
    """Read the command line; describe or train."""
    assert __doc__ is not None
    adopt_launcher()
    required = ("data.prefix|data.blend", "training.output_dir")
    request = parse(sys.argv[1:], __doc__, required)
    if request.dry_run:
        if is_first_rank():
            print(describe(request))
        return
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        if not request.verbose:
            stack.enter_context(_library_log(request))
        with waiting(f"starting    {request.world_size} ranks, loading libraries", is_first_rank()):
            # Imported here: Megatron-core and DeepSpeed take seconds; --help or a typing error should not wait.
            from ecp_scale.checkpoint.saving import SaveFailedError
            from ecp_scale.training.loop import train
            from ecp_scale.training.step import DivergedError

        try:
            train(request, stop)
        except (DivergedError, SaveFailedError) as error:
            if is_first_rank():
                say(f"stopped: {error}")
            sys.exit(1)


def _library_log(request: Request) -> AbstractContextManager[None]:
    """Send what libraries print to a file of this rank in the run folder."""
    assert request.config.training.output_dir is not None
    folder = Path(request.config.training.output_dir) / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return quiet(folder / f"rank-{int(os.environ.get('RANK', '0')):05}.log")
    except OSError as error:
        raise InputError(f"training.output_dir {folder.parent}: {error.strerror or error}") from error


if __name__ == "__main__":
    main()
