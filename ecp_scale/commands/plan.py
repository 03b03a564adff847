"""Plan a launch before it runs: memory, messages and time of every rank. Allocates nothing and needs no GPU.

    ecp-plan --config scaled-13b --gpus 128 --gpu-memory 80GiB [--parallel.tensor 8 ...]

Prints what a rank holds and sends, how long a step may take, and whether it fits; with --propose, layouts that do, the
fastest first; with --rehearse, trains two steps of a narrow copy of the layout on this machine (gloo). Exits 1 where
the layout does not fit.
"""

import argparse
import dataclasses
import json
import re
import sys
from typing import Any

from ecp_scale.command_line import Request, parse
from ecp_scale.config import Config
from ecp_scale.console import waiting
from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.option_parser import OptionParser

UNITS = {"GiB": 1 << 30, "GB": 10**9, "MiB": 1 << 20}
PROPOSED = 3
GPU = "NVIDIA H100 80GB HBM3"


@input_errors_exit()
def main() -> int:
    """Read the command line and print the plan."""
    parser = _parser()
    options, rest = parser.parse_and_pass_on()
    memory, reserve = (memory_size(name, getattr(options, name)) for name in ("gpu_memory", "reserve"))
    if options.gpus < 1:
        raise InputError(f"--gpus is {options.gpus}, expected at least 1")
    if reserve >= memory:
        raise InputError(f"--reserve is {options.reserve}, expected less than --gpu-memory {options.gpu_memory}")
    refused = ""
    try:
        request = parse(rest, "", world_size=options.gpus, options=parser.names)
    except InputError as error:
        if not options.propose:
            raise
        # Of another number of ranks, perhaps.
        request, refused = parse([*rest, "--dry-run"], "", options=parser.names), str(error)
    from ecp_scale.training.corpora import open_data

    config = open_data(request.config)[0] if request.config.data.is_set else request.config
    if config.model.vocab_size is None:
        raise InputError("model.vocab_size is null; set it, or data.prefix to shards, whose tokenizer tells it")
    request = dataclasses.replace(request, config=config)

    from ecp_scale.planning.duration import duration
    from ecp_scale.planning.plan import plan
    from ecp_scale.planning.proposals import proposals

    machine = _machine(options, config)
    tokens = config.tokens_after(config.training.steps)
    if options.tokens is not None:
        tokens = int(_positive(options, "tokens"))
    found = None if refused else plan(request.config, request.deepspeed, options.gpus)
    room = memory - reserve
    fits = found is not None and found.peak_bytes <= room
    notes = [*request.notes, *_suggestion(request, rest)]
    if not options.json:
        print(refused if found is None else found.describe())
        for text in notes:
            print(f"note                {text}")
        if found is not None:
            print(_time(found, machine, tokens))
            share = f"{found.peak_bytes / memory:.0%} of {options.gpu_memory}, of which {options.reserve} are kept free"
            print(f"verdict             {'fits' if fits else 'does not fit'}: {share}")
        if not fits and not options.propose:
            print("try                 --deepspeed_config zero2 or zero3, --training.micro_batch_size, --propose")
        sys.stdout.flush()  # the search may be cut short
    proposed: list[Any] = []
    if options.propose:
        with waiting("looking for layouts that fit, which takes seconds to minutes", not options.json):
            fitting = proposals(request.config, options.gpus, room)
            proposed = sorted(fitting, key=lambda one: duration(one, machine).whole)[:PROPOSED]
        if not options.json:
            _show_proposals(proposed, machine, tokens)
    if options.json:
        content = _as_object(found, proposed, machine, tokens, room)
        content["notes"] = [*filter(None, [refused]), *notes]
        if options.rehearse:
            content["rehearsal"] = rehearse_layout(request)
        print(json.dumps(content, indent=1))
    if options.rehearse and not options.json:
        print(f"\nrehearsal           {rehearse_layout(request)}")
    return 0 if fits else 1


def _show_proposals(proposed: list[Any], machine: Any, tokens: int) -> None:
    for number, one in enumerate(proposed, start=1):
        print(f"\nproposal {number}\n{one.describe()}\n{_time(one, machine, tokens)}")
        print(f"options             {one.options}")
    if not proposed:
        print("\nno layout of these ranks fits: take more of them, or shorter sequences")


def _parser() -> OptionParser:
    parser = OptionParser(description=__doc__, epilog="All other options are those of ecp-pretrain.")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks of the launch")
    parser.add_argument("--gpu-memory", default="80GiB", metavar="SIZE", help="of one of them (default: 80GiB)")
    parser.add_argument(
        "--reserve", default="1GiB", metavar="SIZE", help="of it, for what the allocator cannot use (default: 1GiB)"
    )
    parser.add_argument("--tokens", type=float, metavar="N", help="token budget (default: that of the config)")
    parser.add_argument(
        "--peak-teraflops",
        type=float,
        metavar="X",
        help=f"of one GPU in the run's precision (default: that of an {GPU})",
    )
    for name, default, what in (
        ("utilisation", 0.48, "share of the peak in forward and backward passes, without messages"),
        ("layer-milliseconds", 6.4, "that the host needs to ask for the kernels of a layer, forward and backward"),
        ("node-ranks", 8, "GPUs of a node"),
        (
            "node-gigabytes",
            300.0,
            "per second from a GPU in an all-reduce of a node, as launch/doctor.py tells",
        ),
        ("network-gigabytes", 40.0, "the same over several nodes"),
        ("disk-gigabytes", 5.0, "per second to the file system, from all ranks together"),
    ):
        parser.add_argument(
            f"--{name}", type=type(default), default=default, metavar="X", help=f"{what} (default: {default:g})"
        )
    parser.add_argument("--propose", action="store_true", help="also look for layouts that fit, the fastest first")
    parser.add_argument("--json", action="store_true", help="print the plan and what is proposed as an object")
    parser.add_argument("--rehearse", action="store_true", help="train two steps of a narrow copy on gloo ranks")
    return parser


def _machine(options: argparse.Namespace, config: Config) -> Any:
    """The ``Machine`` that the options describe."""
    from ecp_scale.parallel.device import datasheet_teraflops
    from ecp_scale.planning.duration import Machine

    if options.peak_teraflops is None:
        options.peak_teraflops = datasheet_teraflops(GPU, config.training.precision, config.training.tf32)
    machine = Machine(**{field.name: _positive(options, field.name) for field in dataclasses.fields(Machine)})
    if machine.utilisation > 1:
        raise InputError(f"--utilisation is {machine.utilisation:g}, expected a share of 1")
    return machine


def _positive(options: argparse.Namespace, name: str) -> Any:
    value = getattr(options, name)
    if not 1e-9 < value < 1e18:
        raise InputError(f"--{name.replace('_', '-')} is {value:g}, expected a number above 0")
    return value


def _suggestion(request: Request, words: list[str]) -> list[str]:
    """The JSON for which a preset of ``--config`` is laid out, where the launch has another stage."""
    from ecp_scale.planning.proposals import SUGGESTED
    from ecp_scale.zero import json_config

    named = [word.removeprefix("--config=") for word in words]
    preset = next((word for word in named if word in SUGGESTED), None)
    if preset is None:
        return []
    gpus, stage = SUGGESTED[preset]
    if json_config.zero_stage(request.deepspeed) == stage:
        return []
    return [f"{preset} is laid out for {gpus} GPUs with --deepspeed_config zero{stage}"]


def _time(plan: Any, machine: Any, tokens: int) -> str:
    """How long a step, the tokens, and a checkpoint may take."""
    from ecp_scale.planning.duration import duration, model_utilisation

    step = duration(plan, machine)
    days = tokens / plan.config.tokens_per_step * step.whole / 86400
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in step._asdict().items() if seconds)
    save = plan.checkpoint_bytes / (machine.disk_gigabytes * 1e9)
    return (
        f"time                {step.whole:.3g} s a step ({parts}), MFU {model_utilisation(plan, machine):.2f}; "
        f"{days:,.2f} days for {tokens:,} tokens\n"
        f"                    a checkpoint {save:,.1f} s; estimated by --utilisation, --node-gigabytes and so on"
    )


def _as_object(plan: Any, proposed: list[Any], machine: Any, tokens: int, room: int) -> dict[str, Any]:
    """What is printed, for programs."""
    from ecp_scale.planning.duration import duration, model_utilisation

    def of(one: Any) -> dict[str, Any]:
        step = duration(one, machine)
        return {
            "options": one.options,
            "zero_stage": one.stage,
            "fits": one.peak_bytes <= room,
            "peak_bytes": one.peak_bytes,
            "bytes": {
                **dataclasses.asdict(one.states),
                "activations": one.trace.activations,
                "system": one.system_bytes,
            },
            "messages": one.messages,
            "checkpoint_bytes": one.checkpoint_bytes,
            "checkpoint_seconds": one.checkpoint_bytes / (machine.disk_gigabytes * 1e9),
            "flops_per_step": one.flops_per_step,
            "step_seconds": {**step._asdict(), "whole": step.whole},
            "mfu": model_utilisation(one, machine),
            "days": tokens / one.config.tokens_per_step * step.whole / 86400,
        }

    machine_numbers = dataclasses.asdict(machine)
    own = None if plan is None else of(plan)
    return {"tokens": tokens, "machine": machine_numbers, "plan": own, "proposals": [of(one) for one in proposed]}


def memory_size(name: str, text: str) -> int:
    """Bytes of ``80GiB``.

    Raises:
        InputError: if it is no size.
    """
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)({'|'.join(UNITS)})", text)
    if not match:
        option = name.replace("_", "-")
        raise InputError(f"--{option} is {text!r}, expected a number and one of {', '.join(UNITS)}, as 80GiB")
    return int(float(match[1]) * UNITS[match[2]])


def rehearse_layout(request: Request) -> str:
    """Train the narrow copy; how it went."""
    from ecp_scale.planning.rehearsal import rehearse

    return rehearse(request)
