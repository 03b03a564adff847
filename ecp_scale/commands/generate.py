"""Continue a prompt with an exported model."""

import argparse
import os

from ecp_scale.errors import InputError, input_errors_exit


@input_errors_exit()
def main() -> None:
    """Read the command line and print the prompt with its continuation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=os.path.expanduser, metavar="DIR", help="folder of ecp-convert")
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

    from ecp_scale.checkpoint.export import ExportedModel
    from ecp_scale.evaluation.generation import check_sampling, generate
    from ecp_scale.parallel.device import local_device

    check_sampling(options.max_new_tokens, options.temperature, options.top_k, options.seed)
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
