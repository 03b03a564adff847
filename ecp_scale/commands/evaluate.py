"""Print how well an exported model predicts a text: perplexity per token and per word, bits per byte.

On several ranks (torchrun --nproc-per-node 4 launch/evaluate.py ...) those of a tensor group share the model, and
groups share the text. With --verify, say whether the model is what was trained.
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecp_scale.config.model import GEOMETRY_FIELDS
from ecp_scale.errors import InputError, input_errors_exit, is_first_rank
from ecp_scale.files import finite
from ecp_scale.option_parser import OptionParser

if TYPE_CHECKING:
    from ecp_scale.checkpoint.export import ExportedModel
    from ecp_scale.commands.figures import Figures
    from ecp_scale.evaluation.perplexity import Ids, Text
    from ecp_scale.models.language_model import LanguageModel
    from ecp_scale.parallel.groups import Groups

DATA_OPTIONS = ("protocol", "text_key", "unigram", "by_position", "context", "plot")
CLASSIFIER_IGNORES = ("protocol", "text_key", "unigram", "by_position", "context")
TASKS_OPTIONS = ("batch_size", "limit")
BOTH_OPTIONS = (*GEOMETRY_FIELDS, "json")


def read_options() -> argparse.Namespace:
    """The options of the command line.

    Raises:
        InputError: if they do not belong together, or the file for --json cannot be.
    """
    parser = OptionParser(description=__doc__)
    home = os.path.expanduser
    parser.add_argument("--model", required=True, type=home, metavar="DIR", help="folder of ecp-convert")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data", type=home, metavar="PATH", help=".txt, .jsonl, a folder, a shard prefix (of a classifier alone)"
    )
    what.add_argument(
        "--tasks", type=home, nargs="+", metavar="FILE", help="tasks of lm-eval, in YAML (or names of its own)"
    )
    what.add_argument(
        "--verify", action="store_true", help="compare the digest of every weight, and the loss of the probe"
    )
    data = parser.add_argument_group("with --data")
    data.add_argument("--protocol", choices=("stream", "sliding", "release"), help="default: by the model")
    data.add_argument("--text-key", metavar="KEY", help="key of the text in a .jsonl line (default: text)")
    data.add_argument("--unigram", type=home, metavar="PREFIX", help="also score the unigram of these training shards")
    data.add_argument("--by-position", action="store_true", default=None, help="also the loss by position in a window")
    data.add_argument(
        "--context", metavar="W,W,...", help="also the loss where a position sees at most W tokens, on the same tokens"
    )
    data.add_argument("--plot", type=home, metavar="FILE", help="picture of both, or of a classifier's confusion")
    tasks = parser.add_argument_group("with --tasks")
    tasks.add_argument("--batch-size", type=int, metavar="N", help="requests that are scored together (default: 8)")
    tasks.add_argument("--limit", type=int, metavar="N", help="documents of every task")
    both = parser.add_argument_group("with --data or --tasks")
    for name in GEOMETRY_FIELDS:
        option = "--" + name.replace("_", "-")
        both.add_argument(option, type=int, metavar="N", help=f"another {name} than that of the training")
    both.add_argument("--json", type=home, metavar="FILE", help="write the result here too")
    parser.add_argument(
        "--precision", "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the model (default: fp32)"
    )
    ranks = "ranks that share the model (default: 1; of --tasks: all)"
    parser.add_argument("--parallel.tensor", dest="tensor", type=int, metavar="N", help=ranks)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # which the deepspeed launcher adds
    options = parser.parse_args()
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Refuse what would be ignored or cannot be, before anything is loaded."""
    asked = next(name for name in ("data", "tasks", "verify") if getattr(options, name))
    takes = {"data": DATA_OPTIONS + BOTH_OPTIONS, "tasks": TASKS_OPTIONS + BOTH_OPTIONS, "verify": ()}[asked]
    for name in (*DATA_OPTIONS, *TASKS_OPTIONS, *BOTH_OPTIONS):
        if getattr(options, name) is not None and name not in takes:
            raise InputError(f"--{name.replace('_', '-')} does nothing with --{asked}; leave it out")
    for name in ("batch_size", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least 1")
    if options.context is not None:
        if not all(word.isdecimal() and int(word) for word in options.context.split(",")):
            raise InputError(f"--context is {options.context!r}, expected numbers of tokens separated by commas")
        options.context = sorted(set(map(int, options.context.split(","))))
    if options.plot is not None and Path(options.plot).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {options.plot}: expected a name that ends in .png, .svg or .pdf")
    if options.tasks and importlib.util.find_spec("lm_eval") is None:
        raise InputError("--tasks needs lm-eval: pip install 'ecp-scale[harness]'")
    for name in ("json", "plot"):
        file = getattr(options, name)
        if file and is_first_rank() and not (Path(file).parent.is_dir() and not Path(file).is_dir()):
            raise InputError(f"--{name} {file}: expected a file in a folder that exists")


@input_errors_exit()
def main() -> None:
    """Read the command line, evaluate, print and write the result."""
    options = read_options()
    from ecp_scale.checkpoint.export import ExportedModel
    from ecp_scale.commands.figures import classified
    from ecp_scale.evaluation.ranks import launched
    from ecp_scale.parallel.context import ParallelContext
    from ecp_scale.parallel.device import check_precision
    from ecp_scale.parallel.groups import agreed, decided_slowly
    from ecp_scale.precision import DTYPES

    geometry = {name: getattr(options, name) for name in GEOMETRY_FIELDS if getattr(options, name) is not None}
    exported = ExportedModel.open(options.model).with_geometry(**geometry)
    tensor = options.tensor if options.tensor is not None or options.tasks else 1
    with launched(exported.config, tensor) as groups:
        if options.tasks:
            exported.config.check_predicts_tokens("tasks of lm-eval ask for text, not for")
        alone = next((name for name in ("tasks", "by_position", "context") if getattr(options, name)), None)
        if alone is not None and groups.replicas.size() > 1:
            raise InputError(
                f"--{alone.replace('_', '-')}: {groups.replicas.size()} replicas; expected parallel.tensor of all ranks"
            )
        agreed(lambda: check_precision(groups.device, options.precision))
        dtype = DTYPES[options.precision]
        parallel = ParallelContext(groups.tensor, dtype)
        labelled = exported.config.task == "classification"
        text = _text(exported, groups, options) if options.data and not labelled else None
        counts = decided_slowly(lambda: _training_counts(exported, options.unigram))
        model = agreed(lambda: exported.load(dtype, groups.device, parallel), takes_long=True)
        if labelled and options.data:
            unused = next((name for name in CLASSIFIER_IGNORES if getattr(options, name) is not None), None)
            if unused is not None:
                raise InputError(f"--{unused.replace('_', '-')} does nothing with a classifier; leave it out")
            _show(classified(exported, model, options.data), options)
        elif text is not None:
            _evaluate(exported, model, text, counts, groups, options)
        elif options.tasks:
            _run_tasks(exported, model, options)
        elif not _is_proven(exported, model, options.precision):
            sys.exit(1)


def _show(figures: "Figures", options: argparse.Namespace) -> None:
    """Print, write and draw, on the first rank."""
    if is_first_rank():
        print("\n".join(figures.lines))
        _write(options.json, {"model": options.model, "data": options.data, **figures.content})
        figures.draw_to(options.plot)


def _text(exported: "ExportedModel", groups: "Groups", options: argparse.Namespace) -> "Text":
    from ecp_scale.evaluation.ranks import from_first_rank
    from ecp_scale.evaluation.texts import read_text

    return from_first_rank(lambda: read_text(options.data, exported.tokenizer, options.text_key or "text"), groups)


def _training_counts(exported: "ExportedModel", prefix: str | None) -> "Ids | None":
    """How often each id occurs in the shards of --unigram."""
    from ecp_scale.evaluation.texts import count_tokens, open_shards

    return None if prefix is None else count_tokens(open_shards(prefix, exported.tokenizer))


def _run_tasks(exported: "ExportedModel", model: "LanguageModel", options: argparse.Namespace) -> None:
    """Print the harness's table, and write its results."""
    from ecp_scale.evaluation.harness import run_tasks, table

    results = run_tasks(model, exported.tokenizer, options.tasks, options.batch_size or 8, options.limit)
    if results is not None and is_first_rank():
        print(table(results))
        _write(options.json, {"model": options.model, "results": results["results"], "versions": results["versions"]})


def _is_proven(exported: "ExportedModel", model: "LanguageModel", precision: str) -> bool:
    from ecp_scale.checkpoint.proof import prove

    proof = prove(exported, model, precision)
    if is_first_rank():
        print("\n".join(proof.lines))
    return proof.is_right


def _evaluate(
    exported: "ExportedModel",
    model: "LanguageModel",
    text: "Text",
    counts: "Ids | None",
    groups: "Groups",
    options: argparse.Namespace,
) -> None:
    """Score the text on all ranks; the first one prints and writes."""
    from ecp_scale.commands.figures import by_place
    from ecp_scale.data.tokenizer import gives_texts_back
    from ecp_scale.evaluation.context import check_contexts
    from ecp_scale.evaluation.perplexity import COMPARABLE_UNKNOWN_SHARE, default_protocol, evaluate, unigram_result

    tokenizer = exported.tokenizer
    if options.plot is not None and not (options.by_position or options.context):
        raise InputError("--plot draws what --by-position and --context find; expected one of them")
    if options.context:
        check_contexts(exported.config, text, options.context)
    protocol = options.protocol or default_protocol(exported.config)
    result = evaluate(model, text, tokenizer.end_of_document, protocol, is_first_rank(), groups.replicas)
    places = by_place(exported, model, text, options.by_position, options.context)
    if not is_first_rank():
        return
    content: dict[str, Any] = {
        "model": options.model,
        "data": options.data,
        "protocol": result.protocol,
        "precision": options.precision,
        "bits_per_byte": result.bits_per_byte,
        "token_perplexity": result.token_perplexity,
        "word_perplexity": result.word_perplexity,
        "word_and_line_end_perplexity": result.word_and_line_end_perplexity,
        "tokens_per_word": result.tokens_per_word,
        "tokens_scored": result.tokens_scored,
        "words": result.words,
        "line_ends": result.lines,
        "unknown_tokens": result.unknown,
        "comparable": result.is_comparable,
        "tokenizer_sha256": tokenizer.sha256,
    }
    content |= places.content
    if counts is not None:
        content["unigram_bits_per_byte"] = unigram_result(text, counts).bits_per_byte
    for key, value in content.items():
        if not isinstance(value, list):
            print(f"{key:28} {f'{value:.4f}' if isinstance(value, float) else value}")
    print("\nbits_per_byte compares models of any tokenizer where `comparable` is True: the vocabulary writes the text")
    print("WikiText in the literature (Transformer-XL, Perceiver AR): compare word_and_line_end_perplexity")
    if not result.is_comparable:
        print(
            f"NOT COMPARABLE per word and byte: {result.unknown_share:.2%} of the tokens stand for text that the "
            f"vocabulary cannot write (more than {COMPARABLE_UNKNOWN_SHARE:.1%}), which costs the model nothing"
        )
    if not gives_texts_back(tokenizer):
        print("this tokenizer does not give texts back as they were: what it loses (case, white space) is not scored")
    print("\n".join(places.lines))
    _write(options.json, content)
    places.draw_to(options.plot)


def _write(file: str | None, content: dict[str, Any]) -> None:
    """Write the result to the file of --json, if there is one."""
    if file is None:
        return
    try:
        Path(file).write_text(json.dumps(finite(content), indent=2, default=str) + "\n")
    except OSError as error:
        raise InputError(f"--json {file}: {error.strerror or error}") from error
