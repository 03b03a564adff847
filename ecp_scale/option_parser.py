"""Command lines of the programs: help as it is written, whole names of options, and one line for what is wrong."""

import argparse
import difflib
import sys
from typing import Any, NoReturn


class OptionParser(argparse.ArgumentParser):
    """A parser of a program whose help is its docstring; for an option that it does not know it names the nearest."""

    def __init__(self, **settings: Any) -> None:
        chosen = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**{**chosen, **settings})

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with code 2."""
        known = [option for action in self._actions for option in action.option_strings]
        given = [word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")]
        for word in (word for word in given if word not in known):
            if near := difflib.get_close_matches(word, known, n=1):
                message += f"; {word} is no option, did you mean {near[0]}?"
        super().error(message)
