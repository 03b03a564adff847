"""Print how well an exported model predicts a text: perplexity per token and per word, bits per byte.

On several ranks (torchrun --nproc-per-node 4 launch/evaluate.py ...) those of a tensor group share the model, and
groups share the text. With --verify, say whether the model is what was trained.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecp_scale.config.model import GEOMETRY_FIELDS
from ecp_scale.errors import InputError, input_errors_exit, is_first_rank

if TYPE_CHECKING:
    from ecp_scale.checkpoint.export import ExportedModel
    from ecp_scale.evaluation.perplexity import Text
    from ecp_scale.models.language_model import LanguageModel
    from ecp_scale.parallel.groups import Groups


def read_options() -> argparse.Namespace:
    """The options of the command line.

    Raises:
        InputError: if the file for --json cannot be.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    home = os.path.expanduser
    parser.add_argument("--model", required=True, type=home, metavar="DIR", help="folder of ecp-convert")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=home, metavar="PATH", help=".txt, .jsonl, a folder, a shard prefix")
    what.add_argument(
        "--verify", action="store_true", help="compare the digest of every weight, and the loss of the probe"
    )
    parser.add_argument("--protocol", choices=("stream", "sliding", "release"), help="default: by the model")
    parser.add_argument("--text-key", default="text", help="key of the text in a .jsonl line (default: text)")
    parser.add_argument(
        "--unigram", type=home, metavar="PREFIX", help="also score the unigram of these training shards"
    )
    for name in GEOMETRY_FIELDS:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, metavar="N", help=f"another {name} than that of the training")
    parser.add_argument(
        "--precision", "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the model (default: fp32)"
    )
    parser.add_argument(
        "--parallel.tensor", dest="tensor", type=int, default=1, metavar="N", help="ranks that share it (default: 1)"
    )
    parser.add_argument("--json", type=home, metavar="FILE", help="write the result here too")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # which the deepspeed launcher adds
    options = parser.parse_args()
    if options.json and not (Path(options.json).parent.is_dir() and not Path(options.json).is_dir()):
        raise InputError(f"--json {options.json}: expected a file in a folder that exists")
    return options


@input_errors_exit()
def main() -> None:
    """Read the command line, evaluate, print and write the result."""
    options = read_options()
    from ecp_scale.checkpoint.export import ExportedModel
    from ecp_scale.evaluation.ranks import launched
    from ecp_scale.parallel.context import ParallelContext
    from ecp_scale.parallel.device import check_precision
    from ecp_scale.parallel.groups import agreed
    from ecp_scale.precision import DTYPES

    geometry = {name: getattr(options, name) for name in GEOMETRY_FIELDS if getattr(options, name) is not None}
    if options.verify and geometry:
        raise InputError(f"--verify looks at the model as it was trained; leave out {', '.join(geometry)}")
    exported = ExportedModel.open(options.model).with_geometry(**geometry)
    with launched(exported.config, options.tensor) as groups:
        agreed(lambda: check_precision(groups.device, options.precision))
        dtype = DTYPES[options.precision]
        parallel = ParallelContext(groups.tensor, dtype)
        text = None if options.verify else _text(exported, groups, options)
        model = agreed(lambda: exported.load(dtype, groups.device, parallel), takes_long=True)
        if text is not None:
            _evaluate(exported, model, text, groups, options)
        elif not _is_proven(exported, model, options.precision):
            sys.exit(1)


def _text(exported: "ExportedModel", groups: "Groups", options: argparse.Namespace) -> "Text":
    from ecp_scale.evaluation.ranks import from_first_rank
    from ecp_scale.evaluation.texts import read_text

    return from_first_rank(lambda: read_text(options.data, exported.tokenizer, options.text_key), groups)


def _is_proven(exported: "ExportedModel", model: "LanguageModel", precision: str) -> bool:
    from ecp_scale.checkpoint.proof import prove

    proof = prove(exported, model, precision)
    if is_first_rank():
        print("\n".join(proof.lines))
    return proof.is_right


def _evaluate(
    exported: "ExportedModel", model: "LanguageModel", text: "Text", groups: "Groups", options: argparse.Namespace
) -> None:
    """Score the text on all ranks; the first one prints and writes."""
    from ecp_scale.data.tokenizer import gives_texts_back
    from ecp_scale.evaluation.perplexity import COMPARABLE_UNKNOWN_SHARE, default_protocol, evaluate, unigram_result
    from ecp_scale.evaluation.texts import count_tokens, open_shards

    tokenizer = exported.tokenizer
    protocol = options.protocol or default_protocol(exported.config)
    result = evaluate(model, text, tokenizer.end_of_document, protocol, is_first_rank(), groups.replicas)
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
    if options.unigram:
        counts = count_tokens(open_shards(options.unigram, tokenizer))
        content["unigram_bits_per_byte"] = unigram_result(text, counts).bits_per_byte
    for key, value in content.items():
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
    if options.json:
        try:
            Path(options.json).write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"--json {options.json}: {error.strerror or error}") from error
