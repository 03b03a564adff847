"""Tokenize text into Megatron shards PREFIX-*.bin/.idx and PREFIX.manifest.json.

Inputs: files (.txt, .tokens, .raw, .jsonl, .json with an object per line, .csv, .parquet; all but the last also .gz,
.bz2, .xz or .zst), patterns in quotes, folders with such files, folders that `datasets` saved, standard input (-), and
hub datasets (hub:NAME[:CONFIG[:SPLIT]], streamed). Run the same command again after a crash or a corrected record: it
goes on where it was. The shards are the same, byte by byte, whatever the number of workers and of crashes.
"""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecp_scale.errors import InputError, input_errors_exit
from ecp_scale.option_parser import OptionParser
from ecp_scale.preparation.input_arguments import add_input_arguments

if TYPE_CHECKING:
    from ecp_scale.data.manifest import Manifest
    from ecp_scale.preparation.parsing import Parsing

RECIPES: dict[str, dict[str, Any]] = {
    "wikitext-103": {"text_unit": "article"},
    "wikitext-103-release": {"text_unit": "file", "preparation": "wikitext-release"},
    "pg19": {"text_unit": "file"},
}
"""How known corpora are cut: WikiText into its articles, PG-19 into its books (a file each)."""
IMAGES: dict[str, Any] = {"scifar10": "grey", "scifar10-rgb": "rgb"}
"""Recipes of images with labels, and the colours of their pixels."""
NAMED = 10
"""Bad records that are printed."""


@input_errors_exit()
def main() -> None:
    """Read the command line and print what was written."""
    options = _parser().parse_args()
    if options.recipe in IMAGES:
        _write_images(options)
        return
    if options.tokenizer is None:
        raise InputError("--tokenizer is not set, expected sentencepiece:FILE, hf:FILE_OR_NAME, wordpiece:FILE or byte")
    parsing = _with_chat(parsing_of(options), options)
    if options.dry_run:
        from ecp_scale.preparation.estimate import estimate

        arguments = (options.tokenizer, parsing, options.workers, options.shard_tokens, options.end_token)
        print(estimate(options.input, *arguments))
        return
    from ecp_scale.preparation.preprocessing import preprocess

    manifest = preprocess(
        options.input,
        options.tokenizer,
        options.output_prefix,
        parsing=parsing,
        end_token=options.end_token,
        validation_share=options.validation_share,
        workers=options.workers,
        shard_tokens=options.shard_tokens,
        on_error=options.on_error,
        part=(options.part, options.parts),
        progress=True,
    )
    if options.validation_share:
        from ecp_scale.data.manifest import Manifest

        print(_summary(f"{options.output_prefix}-train", manifest))
        name = f"{options.output_prefix}-validation"
        manifest = Manifest.read(Path(name))
        print(_summary(name, manifest))
    else:
        print(_summary(options.output_prefix, manifest))
    for line in _remarks(manifest, options):
        print(line)


def _write_images(options: argparse.Namespace) -> None:
    """Write the shards of images, and print what they hold.

    Raises:
        InputError: if a flag is given that images have no use for.
    """
    unused = _parser().parse_args(["--input", *options.input, "--output-prefix", options.output_prefix])
    for name, value in vars(options).items():
        if name != "recipe" and value != getattr(unused, name):
            raise InputError(f"--{name.replace('_', '-')} does nothing with --recipe {options.recipe}; leave it out")
    from ecp_scale.preparation.images import write_images

    manifest = write_images(options.input, Path(options.output_prefix), IMAGES[options.recipe])
    counts = manifest.totals
    print(
        f"{options.output_prefix}: {counts.documents:,} images of {counts.tokens // counts.documents - 1:,} values, "
        f"{len(manifest.labels)} labels: {', '.join(manifest.labels)}"
    )


def _parser() -> OptionParser:
    parser = OptionParser(description=__doc__)
    add_input_arguments(parser)
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="sentencepiece:FILE, hf:FILE_OR_NAME, wordpiece:FILE or byte"
    )
    parser.add_argument(
        "--end-token",
        metavar="ENTRY",
        help="token that ends a document (default: what the tokenizer declares, or its end by name)",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        type=os.path.expanduser,
        metavar="PREFIX",
        help="folder and name of the shards",
    )
    parser.add_argument(
        "--validation-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="write PREFIX-train and PREFIX-validation, to which this share goes: of the documents by their hash, or "
        "of blocks of the text where there are few documents",
    )
    parser.add_argument(
        "--text-unit",
        choices=("file", "block", "line", "article"),
        help="a document of plain text: a file (default), lines between blank ones, a line, an article of WikiText",
    )
    parser.add_argument(
        "--recipe",
        choices=sorted({**RECIPES, **IMAGES}),
        help="how a known corpus is cut and prepared, see docs/data.md; scifar10 makes sequences of images",
    )
    _add_filters(parser)
    _add_marks(parser)
    parser.add_argument("--workers", type=int, default=1, help="tokenizing processes (default: 1)")
    parser.add_argument("--shard-tokens", type=int, default=1 << 30, help="most tokens of a shard (default: 2^30)")
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at a bad record or file (default: stop)"
    )
    parser.add_argument("--part", type=int, default=1, metavar="I", help="do this share of the sources, from 1")
    parser.add_argument(
        "--parts", type=int, default=1, metavar="N", help="of so many (default: 1); ecp-merge-shards joins them"
    )
    parser.add_argument("--dry-run", action="store_true", help="estimate size and time from a sample, write nothing")
    return parser


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="keep rows that have it: text, a number, true, false or null",
    )
    parser.add_argument("--min-characters", type=int, default=1, metavar="N", help="drop shorter documents")
    parser.add_argument("--max-characters", type=int, metavar="N", help="drop longer documents")
    parser.add_argument(
        "--share",
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        metavar=("FROM", "TO"),
        help="keep documents whose hash lies there, as 0 0.1 for a tenth (default: 0 1)",
    )


def _add_marks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("for fine-tuning: tokens that are read and have no loss")
    group.add_argument("--prompt-key", metavar="KEY", help="a text before that of --text-key, such as a question")
    group.add_argument(
        "--chat", action="store_true", help="--text-key holds conversations; what the assistant says has a loss"
    )
    group.add_argument(
        "--chat-template",
        type=os.path.expanduser,
        metavar="FILE",
        help="Jinja that writes a conversation (default: that of the tokenizer)",
    )


def _with_chat(parsing: "Parsing", options: argparse.Namespace) -> "Parsing":
    """The same, with the template of --chat.

    Raises:
        InputError: if there is none, or the flags do not fit together.
    """
    if not options.chat:
        if options.chat_template is not None:
            raise InputError("--chat-template is given without --chat")
        return parsing
    if options.prompt_key is not None or parsing.preparation != "none":
        raise InputError("--chat does not go with --prompt-key or a --recipe that prepares texts")

    from ecp_scale.data.tokenizer import load_tokenizer
    from ecp_scale.preparation.segments import ChatTemplate

    tokenizer = load_tokenizer(options.tokenizer, options.end_token)
    return dataclasses.replace(parsing, chat=ChatTemplate.load(options.chat_template, tokenizer))


def parsing_of(options: argparse.Namespace) -> "Parsing":
    """What the flags say of documents; a flag wins over the recipe.

    Raises:
        InputError: if a flag does not fit.
    """
    where = []
    for condition in options.where:
        key, equals, value = condition.partition("=")
        if not key or not equals:
            raise InputError(f"--where is {condition!r}, expected KEY=VALUE")
        where.append((key, value))
    if options.min_characters < 1 or (options.max_characters or options.min_characters) < options.min_characters:
        raise InputError(
            f"--min-characters is {options.min_characters} and --max-characters {options.max_characters}, expected "
            "1 <= minimum <= maximum"
        )
    if not 0 <= options.share[0] < options.share[1] <= 1:
        raise InputError(f"--share is {options.share[0]} {options.share[1]}, expected 0 <= from < to <= 1")
    settings = dict(RECIPES.get(options.recipe, {}))
    if options.text_unit:
        settings["text_unit"] = options.text_unit

    from ecp_scale.preparation.parsing import Parsing

    return Parsing(
        text_key=options.text_key,
        where=tuple(where),
        min_characters=options.min_characters,
        max_characters=options.max_characters,
        share=(options.share[0], options.share[1]),
        stdin=options.stdin,
        prompt_key=options.prompt_key,
        **settings,
    )


def _summary(name: str, manifest: "Manifest") -> str:
    counts = manifest.totals
    return (
        f"{name}: {len(manifest.shards):,} shards, {counts.documents:,} documents, {counts.tokens:,} tokens, "
        f"{counts.words:,} words ({counts.words + counts.lines:,} with line ends), {counts.bytes:,} bytes"
    )


def _remarks(manifest: "Manifest", options: argparse.Namespace) -> list[str]:
    """What was left out, how documents end, and what the tokenizer loses."""
    from ecp_scale.data.manifest import unread_lines
    from ecp_scale.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer, options.end_token)
    lines = [
        f"left out: {manifest.skipped}",
        f"documents end with id {tokenizer.end_of_document}: {tokenizer.end_reason}",
    ]
    lines += [f"  bad: {reason}" for reason in manifest.skipped.named[:NAMED]]
    if manifest.skipped.bad > NAMED:
        lines.append(f"  and {manifest.skipped.bad - NAMED:,} more; the manifest names the first hundred")
    if manifest.settings.get("block_characters"):
        characters = manifest.settings["block_characters"]
        lines.append(f"few documents: the text was shared out in blocks of about {characters:,} characters")
    lines += [f"not read: {line}" for line in unread_lines(manifest.unread)]
    if manifest.totals.unknown:
        lines.append(f"unknown tokens: {manifest.totals.unknown:,}, {manifest.totals.unknown_share:.3%} of all")
    if not manifest.tokenizer.gives_texts_back:
        lines.append("this tokenizer does not give texts back as they were (case, white space or characters are lost)")
    return lines
