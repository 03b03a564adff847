"""Continue prompts with an exported model; text appears as it is made.

On several ranks (torchrun --nproc-per-node 4 launch/generate.py ...) all share the model.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ecp_scale.console import say
from ecp_scale.errors import InputError, input_errors_exit, is_first_rank
from ecp_scale.option_parser import OptionParser

if TYPE_CHECKING:
    from ecp_scale.data.tokenizer import Tokenizer
    from ecp_scale.evaluation.generation import Sampling
    from ecp_scale.models.language_model import LanguageModel


def read_options() -> argparse.Namespace:
    """The options of the command line."""
    parser = OptionParser(description=__doc__)
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
    parser.add_argument(
        "--precision", "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the model (default: fp32)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each continuation, and no text")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # which the deepspeed launcher adds
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
    prompts = list(_prompts(options)) if is_first_rank() else []

    from ecp_scale.checkpoint.export import ExportedModel
    from ecp_scale.evaluation.generation import Sampling
    from ecp_scale.evaluation.ranks import launched
    from ecp_scale.parallel.context import ParallelContext
    from ecp_scale.parallel.device import check_precision
    from ecp_scale.parallel.groups import agreed, decided
    from ecp_scale.precision import DTYPES

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    samplings = [
        Sampling(**{name: getattr(options, name) for name in names}, seed=options.seed + number)
        for number in range(options.num_samples)
    ]
    for sampling in samplings:
        sampling.check()
    exported = ExportedModel.open(options.model)
    exported.config.check_predicts_tokens("nothing follows under")
    with launched(exported.config, tensor=None) as groups:
        agreed(lambda: check_precision(groups.device, options.precision))
        encoded = decided(lambda: _encoded(exported.tokenizer, prompts, options.inside_document))
        parallel = ParallelContext(groups.tensor, DTYPES[options.precision])
        model = agreed(lambda: exported.load(parallel.dtype, groups.device, parallel), takes_long=True)
        made, began = 0, time.perf_counter()
        for prompt, ids in encoded:
            for sampling in samplings:
                made += _continue(model, exported.tokenizer, prompt, ids, sampling, options)
        seconds = time.perf_counter() - began
    if is_first_rank():
        say(f"{made:,} tokens in {seconds:.1f} s, {made / seconds:.1f} per second, prompts included")
        if not made:
            say("nothing was made: the document ended at once; another --seed, or a model of more steps, may go on")


def _encoded(
    tokenizer: "Tokenizer", prompts: list[tuple[str, str]], inside_document: bool
) -> list[tuple[str, list[int]]]:
    """Every prompt with its ids."""
    encoded = []
    for where, prompt in prompts:
        ids = tokenizer.encode(prompt)
        if not ids:
            raise InputError(f"{where} {prompt!r:.60} has no tokens; expected some text")
        encoded.append((prompt, ids if inside_document else [tokenizer.end_of_document, *ids]))
    return encoded


def _continue(
    model: "LanguageModel",
    tokenizer: "Tokenizer",
    prompt: str,
    ids: list[int],
    sampling: "Sampling",
    options: argparse.Namespace,
) -> int:
    """Print one continuation, and say how many tokens it has."""
    from ecp_scale.evaluation.continuation import pieces_of_text
    from ecp_scale.evaluation.generation import generate

    new: list[int] = []

    def counted() -> Iterator[int]:
        for token in generate(model, ids, options.max_new_tokens, sampling, tokenizer.end_of_document):
            new.append(token)
            yield token

    pieces = pieces_of_text(tokenizer, ids, counted(), options.stop)
    if options.json:
        content = {"prompt": prompt, "text": "".join(pieces), "tokens": len(new), "seed": sampling.seed}
        _print(json.dumps(content) + "\n")
        return len(new)
    _print(prompt)
    try:
        for piece in pieces:
            _print(piece)
    finally:  # also where it is interrupted
        _print("\n")
    return len(new)


def _print(text: str) -> None:
    """Show what the first rank makes; the others make the same."""
    if is_first_rank():
        print(text, end="", flush=True)


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
        yield where, _checked(f"{where}: {options.text_key!r}", text)
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
