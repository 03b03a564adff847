"""Continue prompts with an exported model; text appears as it is made."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ecp_scale.console import say
from ecp_scale.errors import InputError, input_errors_exit


def read_options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    home = os.path.expanduser
    parser.add_argument("--model", required=True, type=home, metavar="DIR", help="folder of ecp-convert")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="text to continue, of any length")
    source.add_argument(
        "--prompt-file", type=home, metavar="FILE", help="file with it, - for standard input; .jsonl: one in every line"
    )
    parser.add_argument("--text-key", default="prompt", help="key of the text in a .jsonl line (default: prompt)")
    parser.add_argument(
        "--inside-document", action="store_true", help="the prompt does not begin a document: nothing is put before it"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens to add (default: 128)")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends it; may be repeated"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="among the likeliest of probability P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="among those of P times the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: say new things")
    parser.add_argument("--seed", type=int, default=1, help="of the first sample; others count on (default: 1)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each continuation, and no text")
    options = parser.parse_args()
    for name in ("num_samples", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least 1")
    if "" in options.stop:
        raise InputError("--stop is empty, expected at least one character")
    return options


@input_errors_exit()
def main() -> None:
    """Read the command line and print every prompt with its continuations."""
    options = read_options()
    prompts = list(_prompts(options))

    from ecp_scale.checkpoint.export import ExportedModel
    from ecp_scale.evaluation.continuation import pieces_of_text
    from ecp_scale.evaluation.generation import Sampling, generate
    from ecp_scale.parallel.device import local_device

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    samplings = [
        Sampling(**{name: getattr(options, name) for name in names}, seed=options.seed + number)
        for number in range(options.num_samples)
    ]
    samplings[-1].check()
    exported = ExportedModel.open(options.model)
    tokenizer = exported.tokenizer
    encoded = []
    for where, prompt in prompts:
        ids = tokenizer.encode(prompt)
        if not ids:
            raise InputError(f"{where} {prompt!r:.60} has no tokens; expected some text")
        encoded.append(ids if options.inside_document else [tokenizer.end_of_document, *ids])
    model = exported.load(device=local_device(0))
    made, began = 0, time.perf_counter()
    for (_, prompt), ids in zip(prompts, encoded, strict=True):
        for sampling in samplings:
            new: list[int] = []

            def counted(ids: list[int] = ids, sampling: Sampling = sampling, new: list[int] = new) -> Iterator[int]:
                for token in generate(model, ids, options.max_new_tokens, sampling, tokenizer.end_of_document):
                    new.append(token)
                    yield token

            pieces = pieces_of_text(tokenizer, ids, counted(), options.stop)
            if options.json:
                text = "".join(pieces)
                print(
                    json.dumps({"prompt": prompt, "text": text, "tokens": len(new), "seed": sampling.seed}), flush=True
                )
            else:
                print(prompt, end="", flush=True)
                for piece in pieces:
                    print(piece, end="", flush=True)
                print(flush=True)
            made += len(new)
    seconds = time.perf_counter() - began
    say(f"{made:,} tokens in {seconds:.1f} s, {made / seconds:.1f} per second, prompts included")


def _prompts(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Where each prompt comes from, and the prompt."""
    if options.prompt is not None:
        yield "--prompt", _checked("--prompt", options.prompt)
        return
    name = options.prompt_file
    try:
        content = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    except OSError as error:
        raise InputError(f"--prompt-file {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {name}: not valid UTF-8 at byte {error.start}") from error
    if not name.endswith(".jsonl"):
        yield f"--prompt-file {name}", _checked(f"--prompt-file {name}", content)
        return
    found = False
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where, found = f"{name}, line {number}", True
        try:
            text = json.loads(line)[options.text_key]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{where}: expected a JSON object with {options.text_key!r} ({error})") from error
        if not isinstance(text, str):
            raise InputError(f"{where}: {options.text_key!r} is {type(text).__name__}, expected text")
        yield where, _checked(where, text)
    if not found:
        raise InputError(f"--prompt-file {name}: holds no prompts")


def _checked(where: str, prompt: str) -> str:
    if not prompt:
        raise InputError(f"{where} is empty, expected at least one character")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} {prompt!r} is not valid UTF-8") from None
    return prompt
