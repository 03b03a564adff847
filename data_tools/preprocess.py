"""Tokenize text into Megatron shards PREFIX-*.bin/.idx and PREFIX.manifest.json.

Inputs: .txt, .jsonl[.gz|.zst], .parquet, folders with such files, folders that `datasets` saved, and hub datasets
(hub:NAME[:CONFIG[:SPLIT]], streamed). Run the same command again after a crash: it goes on with the first unfinished
shard. The shards are the same, byte by byte, whatever the number of workers and of crashes.
"""

import argparse
from typing import Any

from ecp_scale.data.parsing import Parsing
from ecp_scale.errors import InputError, input_errors_exit

RECIPES: dict[str, dict[str, Any]] = {
    "wikitext-103": {"text_unit": "article"},
    "wikitext-103-release": {"text_unit": "file", "preparation": "wikitext-release"},
    "pg19": {"text_unit": "file"},
}
"""How known corpora are cut: WikiText into its articles, PG-19 into its books (a file each)."""


def main() -> None:
    """Read the command line and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders, hub datasets")
    parser.add_argument(
        "--tokenizer", required=True, metavar="SPEC", help="sentencepiece:FILE, hf:FILE_OR_NAME, wordpiece:FILE or byte"
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="folder and name of the shards")
    parser.add_argument("--text-key", default="text", help="key or column of the text (default: text)")
    parser.add_argument(
        "--text-unit",
        choices=("file", "block", "line", "article"),
        help="a document of plain text: a file (default), lines between blank ones, a line, an article of WikiText",
    )
    parser.add_argument("--recipe", choices=sorted(RECIPES), help="settings of a known corpus")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="keep rows that have it")
    parser.add_argument("--min-characters", type=int, default=1, metavar="N", help="drop shorter documents")
    parser.add_argument("--max-characters", type=int, metavar="N", help="drop longer documents")
    parser.add_argument(
        "--share",
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        metavar=("FROM", "TO"),
        help="keep documents whose hash lies there: 0 0.01 for validation and 0.01 1 for training (default: 0 1)",
    )
    parser.add_argument("--workers", type=int, default=1, help="tokenizing processes (default: 1)")
    parser.add_argument("--shard-tokens", type=int, default=1 << 30, help="most tokens of a shard (default: 2^30)")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="bad records and files")
    parser.add_argument("--part", type=int, default=1, metavar="I", help="do this share of the sources, from 1")
    parser.add_argument("--parts", type=int, default=1, metavar="N", help="of so many (default: 1); merge_shards.py")
    parser.add_argument("--dry-run", action="store_true", help="estimate size and time from a sample, write nothing")
    options = parser.parse_args()
    parsing = parsing_of(options)
    if options.dry_run:
        from ecp_scale.data.estimate import estimate

        print(estimate(options.input, options.tokenizer, parsing, options.workers, options.shard_tokens))
        return
    from ecp_scale.data.preprocessing import preprocess

    manifest = preprocess(
        options.input,
        options.tokenizer,
        options.output_prefix,
        parsing=parsing,
        workers=options.workers,
        shard_tokens=options.shard_tokens,
        on_error=options.on_error,
        part=(options.part, options.parts),
        progress=True,
    )
    counts, skipped = manifest.totals, manifest.skipped
    print(
        f"{options.output_prefix}: {len(manifest.shards)} shards, {counts.documents} documents, "
        f"{counts.tokens} tokens, {counts.words} words, {counts.bytes} bytes; "
        f"{skipped.dropped} records dropped, {skipped.bad} bad"
    )


def parsing_of(options: argparse.Namespace) -> Parsing:
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
    return Parsing(
        text_key=options.text_key,
        where=tuple(where),
        min_characters=options.min_characters,
        max_characters=options.max_characters,
        share=(options.share[0], options.share[1]),
        **settings,
    )


if __name__ == "__main__":
    with input_errors_exit():
        main()
