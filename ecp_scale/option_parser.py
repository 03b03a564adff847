"""Command lines of the programs: help as it is written, whole names of options, and one line for what is wrong."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class OptionParser(argparse.ArgumentParser):
    """A parser of a program whose help is its docstring; for an option that it does not know it names the nearest."""

    def __init__(self, **settings: Any) -> None:
        chosen = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**{**chosen, **settings})
        self._passes_on = False

    @property
    def names(self) -> list[str]:
        """Every option, such as ``--output``."""
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]

    def parse_and_pass_on(self, words: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """The program's own options, and what another parser is to read."""
        self._passes_on = True
        return self.parse_known_args(words)

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with code 2."""
        given = [] if self._passes_on else [word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")]
        for word in (word for word in given if word not in self.names):
            if near := difflib.get_close_matches(word, self.names, n=1):
                message += f"; {word} is no option, did you mean {near[0]}?"
        super().error(message)
