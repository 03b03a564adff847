"""Train an ECP language model.

    deepspeed --num_gpus 8 launch/pretrain_ecp.py --config scaled-125m --data.prefix shards/train \\
        --training.output_dir runs/first --deepspeed_config zero1
    deepspeed --num_gpus 8 launch/pretrain_ecp.py --config runs/first/config.yaml --resume auto

Where the package is installed, `deepspeed --module ecp_scale.commands.pretrain` is the same from any folder, and
`ecp-pretrain` is one rank: the only one, or that of a task under `srun`. SIGTERM, SIGINT, SIGHUP and SIGUSR1 save and
stop, and so does a file `stop` in the run folder.
"""

import gc
import os
import sys
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from ecp_scale.cluster.ranks import adopt_launcher, on_one_host
from ecp_scale.cluster.signals import StopRequest
from ecp_scale.command_line import Request, parse, to_yaml
from ecp_scale.config import Config
from ecp_scale.console import counted, quiet, say, waiting
from ecp_scale.errors import InputError, input_errors_exit, is_first_rank
from ecp_scale.zero import json_config


def describe(request: Request) -> str:
    """What the config counts, what its shards and run folder hold, and the whole resolved config.

    Raises:
        InputError: if the shards or the folder cannot be used.
    """
    config, data, folder = request.config, "not set", request.config.training.output_dir or "not set"
    changed: list[str] = []
    blend = None
    _check_places(config)
    known = [path for path in (config.training.output_dir, config.checkpoint.mirror) if path and Path(path).exists()]
    if known or request.init_from is not None:
        from ecp_scale.training.report import changes  # Megatron-core and torch, which take seconds
        from ecp_scale.training.starting import foreseen

        start, config, blend = foreseen(request)
        if start.folder is not None:
            changed = changes(Path(folder), start, config)
            folder += f", goes on from {start.folder.name}"
        elif known:
            folder += ", which has no checkpoint"
    elif config.data.is_set:
        from ecp_scale.training.corpora import open_data

        config, blend, _ = open_data(config)
    if blend is not None:
        data = blend.describe(config.tokens_after(config.training.steps))
    model, parallel, training = config.model, config.parallel, config.training
    if model.vocab_size is None:
        counts = "unknown until the tokenizer is (model.vocab_size is null)"
    else:
        counts = f"{model.parameters:,}; {model.flops_per_token:,.0f} FLOPs per token, forward and backward"
    stage = json_config.zero_stage(request.deepspeed)
    lines = {
        "architecture": f"{model.architecture}, {model.layers} layers, width {model.width}, {model.heads} heads",
        "parameters": counts,
        "sequence": f"{model.sequence_length:,} tokens, the last {model.geometry.trained_positions:,} of them trained",
        "receptive field": f"{model.geometry.receptive_field_formula} tokens",
        "layout": f"tensor {parallel.tensor} x context {parallel.context}, ZeRO-{stage}, {training.precision}",
        "optimizer": f"{config.optimizer.name}, rate {config.optimizer.learning_rate:g}, {config.optimizer.schedule}",
        "step": f"{config.tokens_per_step:,} tokens, {training.micro_batch_size} sequences at a time on a rank",
        "run": f"{training.steps:,} steps, {config.tokens_after(training.steps):,} tokens",
        "data": data,
        "folder": folder,
    }
    notes = [f"note: {note}" for note in (*request.notes, *changed)]
    return "\n".join([*(f"{name:19} {text}" for name, text in lines.items()), *notes, "", to_yaml(config).rstrip()])


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
    if on_one_host():  # else the first rank looks, and then the first of every host, in one launch
        from ecp_scale.training.corpora import check_prefixes

        check_prefixes(request.config)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        for note in request.notes if is_first_rank() else ():
            say(f"note        {note}")
        if not request.verbose:
            stack.enter_context(_library_log(request))
        with waiting(f"starting    {counted(request.world_size, 'rank')}, loading libraries", is_first_rank()):
            # Imported here: Megatron-core and DeepSpeed take seconds; --help or a typing error should not wait. Looking
            # for garbage meanwhile takes a fifth of the time and finds none.
            gc.disable()
            from ecp_scale.checkpoint.saving import SaveFailedError
            from ecp_scale.training.loop import train
            from ecp_scale.training.step import DivergedError

            gc.enable()

        try:
            train(request, stop)
        except (DivergedError, SaveFailedError) as error:
            if is_first_rank():
                say(f"stopped: {error}")
            sys.exit(1)
    if stop.exit_code:
        sys.exit(stop.exit_code)


def _check_places(config: Config) -> None:
    """Refuse folders that a launch from this host could not make."""
    run, mirror = config.training.output_dir, config.checkpoint.mirror
    for field, folder in (("training.output_dir", run), ("checkpoint.mirror", mirror)):
        if folder is None:
            continue
        whole = Path(folder).absolute()
        try:
            there = next(path for path in (whole, *whole.parents) if path.exists() or path.is_symlink())
        except OSError as error:
            raise InputError(f"{field} {folder}: {error.strerror or error}") from error
        if not there.is_dir():
            raise InputError(f"{field} {folder}: {there} is no folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"{field} {folder}: nothing can be written to {there}")
    if run is not None and mirror is not None:
        from ecp_scale.checkpoint.mirror import check_apart

        check_apart(Path(mirror), Path(run))


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
