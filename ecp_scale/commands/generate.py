"""Continue a prompt with an exported model."""

import argparse
import os

from ecp_scale.errors import InputError, input_errors_exit

LEAST_TEMPERATURE = 0.001


@input_errors_exit()
def main() -> None:
    """Read the command line and print the prompt with its continuation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", required=True, type=os.path.expanduser, metavar="DIR", help="folder of launch/convert_checkpoint.py"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue, of any length")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens to add (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens only")
    parser.add_argument("--seed", type=int, default=1, help="of the sampling (default: 1)")
    options = parser.parse_args()
    if not options.prompt:
        raise InputError("--prompt is empty, expected at least one character")
    if _is_no_utf8(options.prompt):
        raise InputError(f"--prompt {options.prompt!r} is not valid UTF-8")
    if options.temperature != 0 and not LEAST_TEMPERATURE <= options.temperature <= 1 / LEAST_TEMPERATURE:
        raise InputError(
            f"--temperature is {options.temperature}, expected 0 (the likeliest token) or a number from "
            f"{LEAST_TEMPERATURE} to {1 / LEAST_TEMPERATURE:.0f}"
        )
    if options.max_new_tokens < 1 or (options.top_k is not None and options.top_k < 1):
        raise InputError("expected --max-new-tokens >= 1 and --top-k >= 1")
    if not 0 <= options.seed < 2**63:
        raise InputError(f"--seed is {options.seed}, expected a number from 0 to 2^63 - 1")

    from ecp_scale.checkpoint.export import ExportedModel
    from ecp_scale.evaluation.generation import generate
    from ecp_scale.parallel.device import local_device

    exported = ExportedModel.open(options.model)
    prompt = exported.tokenizer.encode(options.prompt)
    if not prompt:
        raise InputError(f"--prompt {options.prompt!r} has no tokens; expected some text")
    new = generate(
        exported.load(device=local_device(0)),
        prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        end_of_document=exported.tokenizer.end_of_document,
    )
    print(exported.tokenizer.decode([*prompt, *new]))


def _is_no_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
