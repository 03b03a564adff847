"""Train an ECP language model.

    deepspeed --num_gpus 8 launch/pretrain_ecp.py --config FILE [--section.key value ...] \\
        [--deepspeed_config ds_configs/zero1.json] [--resume auto] [--dry-run]
"""

import sys

from ecp_scale.command_line import Request, parse, to_yaml
from ecp_scale.errors import input_errors_exit, is_first_rank


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
        f"reach in tokens     {model.geometry.reach_formula}",
        f"tokens per step     {config.tokens_per_step:,}",
        f"tokens of the run   {config.tokens_per_step * config.training.steps:,}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the command line; describe or train."""
    assert __doc__ is not None
    required = ("data.prefix|data.blend", "training.output_dir")
    request = parse(sys.argv[1:], __doc__, required)
    if request.dry_run:
        if is_first_rank():
            print(describe(request))
        return
    # Imported here: Megatron-core and DeepSpeed take seconds, and --help or a typing error should not wait for them.
    from ecp_scale.training.loop import train
    from ecp_scale.training.step import DivergedError

    try:
        train(request)
    except DivergedError as error:
        if is_first_rank():
            print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    with input_errors_exit():
        main()
