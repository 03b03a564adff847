"""Texts of which only a part has a loss: answers behind their prompts, and what an assistant says in a chat."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.errors import InputError

CONFIG, FILE = "tokenizer_config.json", "chat_template.jinja"
"""Files of Hugging Face beside a tokenizer.json that hold its chat template."""


class Segments(NamedTuple):
    """A text in parts, each with whether its tokens have a loss; every part is encoded by itself.

    ``control``: names of control tokens in it become the tokens, as a chat template means them.
    """

    parts: tuple[tuple[str, bool], ...]
    control: bool = False

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(text for text, _ in self.parts)


class ChatError(ValueError):
    """A conversation that a template cannot write; the message says why, the caller knows where."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template in Jinja, as Hugging Face's tokenizers have it. It travels to the worker processes."""

    source: str
    tokens: tuple[tuple[str, str], ...] = ()
    """Names of special tokens that a template may write, such as ``eos_token``."""
    control: tuple[str, ...] = ()
    """Names of control tokens, which no message may hold: a user could end his turn with them."""

    @classmethod
    def load(cls, file: str | None, tokenizer: Tokenizer) -> "ChatTemplate":
        """Read a template from a file, or from beside the tokenizer.

        Raises:
            InputError: if there is none, or it is not valid.
        """
        folder = None if tokenizer.path is None else tokenizer.path.parent
        config = {} if folder is None else _declarations(folder / CONFIG)
        source = _read(Path(file)) if file is not None else None
        if source is None and folder is not None:
            source = _read(folder / FILE) if (folder / FILE).exists() else config.get("chat_template")
        if not isinstance(source, str):
            held = "holds several, of which none is named" if source else "has none"
            raise InputError(
                f"tokenizer {tokenizer.path or tokenizer.kind}: {held} ({FILE}, or chat_template in {CONFIG}, beside "
                "it); name a file with --chat-template"
            )
        tokens = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
        known = tuple((name, text) for name, text in tokens.items() if text is not None)
        template = cls(source, known, tuple(sorted(getattr(tokenizer, "control_names", ()))))
        _compiled(template.source)
        return template

    def segments(self, messages: Any) -> Segments:
        """A conversation as its template writes it; what the assistant says has a loss.

        Args:
            messages: a list of {"role": ..., "content": ...}.

        Raises:
            ChatError: if it is no conversation, or the template does not write it turn by turn.
        """
        turns = self._checked(messages)
        parts: list[tuple[str, bool]] = []
        done = ""
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            # As at the time of use: the prompt with the opening of the answer, and then the answer alone.
            asked, answered = self._render(turns[:number], True), self._render(turns[: number + 1], False)
            if not asked.startswith(done) or not answered.startswith(asked):
                raise ChatError(
                    f"the template does not write message {number + 1} behind what it wrote before, so its part of "
                    "the text cannot be told"
                )
            parts += [(asked[len(done) :], False), (answered[len(asked) :], True)]
            done = answered
        if not parts:
            raise ChatError("no message of the assistant, so nothing has a loss")
        return Segments(tuple(part for part in parts if part[0]), control=True)

    def _checked(self, messages: Any) -> list[dict[str, Any]]:
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise ChatError(f"the conversation is {type(messages).__name__}, expected a list of messages")
        for number, turn in enumerate(messages, start=1):
            for key in ("role", "content"):
                found = turn.get(key) if isinstance(turn, dict) else None
                if not isinstance(found, str):
                    raise ChatError(f"message {number} has no text as {key!r}")
                held = next((name for name in self.control if name in found), None)
                if held is not None:
                    raise ChatError(f"message {number} holds the name of a control token, {held}")
        return list(messages)

    def _render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return str(
                _compiled(self.source).render(
                    messages=messages, add_generation_prompt=add_generation_prompt, **dict(self.tokens)
                )
            )
        except Exception as error:  # Whatever a template raises: no conversation ends the run.
            raise ChatError(f"the chat template: {error}") from error


@cache
def _compiled(source: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise ChatError(message)

    # The settings and names that templates are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise InputError(f"the chat template is not valid Jinja: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat template {path}: {getattr(error, 'strerror', None) or error}") from error


def _declarations(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    return found if isinstance(found, dict) else {}


def _content(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
