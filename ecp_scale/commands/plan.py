"""Plan a launch before it runs: memory, messages and time of every rank. Allocates nothing and needs no GPU.

    ecp-plan --config scaled-13b --gpus 128 --gpu-memory 80GiB [--parallel.tensor 8 ...]

Prints what a rank holds and sends, and whether it fits; with --propose, layouts that do; with --rehearse, trains two
steps of a narrow copy of the layout on this machine (gloo). Exits 1 where the layout does not fit.
"""

import argparse
import dataclasses
import re

from ecp_scale.command_line import Request, parse
from ecp_scale.errors import InputError, input_errors_exit

UNITS = {"GiB": 1 << 30, "GB": 10**9, "MiB": 1 << 20}
PROPOSED = 3


@input_errors_exit()
def main() -> int:
    """Read the command line and print the plan."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="All other options are those of ecp-pretrain.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks of the launch")
    parser.add_argument("--gpu-memory", default="80GiB", metavar="SIZE", help="of one of them (default: 80GiB)")
    parser.add_argument("--tokens", type=float, metavar="N", help="token budget (default: that of the config)")
    parser.add_argument("--peak-teraflops", type=float, default=989, metavar="X", help="of one GPU (default: 989)")
    parser.add_argument("--utilisation", type=float, default=0.4, metavar="X", help="share of the peak (default: 0.4)")
    parser.add_argument("--propose", action="store_true", help="also look for layouts that fit")
    parser.add_argument("--rehearse", action="store_true", help="train two steps of a narrow copy on gloo ranks")
    options, rest = parser.parse_known_args()
    memory = memory_size(options.gpu_memory)
    if options.gpus < 1:
        raise InputError(f"--gpus is {options.gpus}, expected at least 1")
    request = parse(rest, "", world_size=options.gpus)
    from ecp_scale.training.corpora import open_data

    config = open_data(request.config)[0] if request.config.data.is_set else request.config
    if config.model.vocab_size is None:
        raise InputError("model.vocab_size is null; set it, or data.prefix to shards, whose tokenizer tells it")
    request = dataclasses.replace(request, config=config)

    from ecp_scale.planning.plan import plan
    from ecp_scale.planning.proposals import proposals

    found = plan(request.config, request.deepspeed, options.gpus)
    print(found.describe())
    for note in request.notes:
        print(f"note                {note}")
    tokens = options.tokens or config.tokens_after(config.training.steps)
    days = found.days(tokens, options.peak_teraflops, options.utilisation)
    print(
        f"time                {days:,.2f} days for {tokens:,.0f} tokens at {options.utilisation:.0%} of "
        f"{options.gpus} x {options.peak_teraflops:g} TFLOP/s (--utilisation, --peak-teraflops: assumed)"
    )
    fits = found.peak_bytes <= memory
    share = found.peak_bytes / memory
    print(f"verdict             {'fits' if fits else 'does not fit'}: {share:.0%} of {options.gpu_memory}")
    if not fits and not options.propose:
        print("try                 --deepspeed_config zero2 or zero3, --training.micro_batch_size, --propose")
    if options.propose:
        count = 0
        for proposal in proposals(request.config, options.gpus, memory):
            print(f"\nproposal {count + 1}\n{proposal.describe()}\noptions             {proposal.options}", flush=True)
            count += 1
            if count == PROPOSED:
                break
        if not count:
            print("\nno layout of these ranks fits: take more of them, or shorter sequences")
    if options.rehearse:
        rehearse_layout(request)
    return 0 if fits else 1


def memory_size(text: str) -> int:
    """Bytes of ``80GiB``.

    Raises:
        InputError: if it is no size.
    """
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)({'|'.join(UNITS)})", text)
    if not match:
        raise InputError(f"--gpu-memory is {text!r}, expected a number and one of {', '.join(UNITS)}, as 80GiB")
    return int(float(match[1]) * UNITS[match[2]])


def rehearse_layout(request: Request) -> None:
    """Train the narrow copy and say how it went."""
    from ecp_scale.planning.rehearsal import rehearse

    print(f"\nrehearsal           {rehearse(request)}")
