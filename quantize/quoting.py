"""Foreign strings as data: names from a checkpoint, a server, the Hub or a user are quoted here before any use.

Every writer (messages, logs, Markdown, HTML, XML, YAML, shell commands, GitHub's workflow commands) takes its functions
from this module, so that a name, a version or an answer is never more than text in what it becomes a part of.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping

# C0 and C1 controls, line separators, marks and overrides of direction, invisible tags, lone surrogates and the like.
# XML and HTML cannot hold most of them, and a terminal or a reader takes the others for something else.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e007f\ud800-\udfff\ufffe\uffff]"
)
# GitHub's runner obeys `::name::` at the beginning of a line, and `##[name]` anywhere in it.
_COMMAND = re.compile(r"^(\s*):(?=:)|##(?=\[)", re.MULTILINE)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]#|~$!])")
# What begins a list or a rule where a line of Markdown begins with it.
_MARKDOWN_START = re.compile(r"^(\s*\d*)(?=[.)](?:\s|$)|[-+](?:\s|$)|-{2}|=+\s*$)")
# An address, a mail and a mention of somebody are links without any mark.
_MARKDOWN_LINK = re.compile(r"(?<=\w):(?=//)|(?<=\bwww)\.|@(?=\w)", re.IGNORECASE)
_SECRETS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{10,}"), "hf_…"),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE), r"\1 …"),
    (re.compile(r"\b([a-z][a-z0-9+.-]{0,20}://)[^\s/?#'\"]+@", re.IGNORECASE), r"\1…@"),
    (re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", re.IGNORECASE), r"\1?…"),
)
_SECRET_WORDS = (
    r"(?:api[-_]?keys?|access[-_]?keys?|private[-_]?keys?|key|token|secrets?|passw(?:or)?d|passphrase|credentials?|"
    r"auth|authorization|cookie)"
)
# Options and variables whose value opens something: --api-key, --hf-token, AWS_SECRET_ACCESS_KEY, HF_TOKEN, PASSWORD.
_SECRET_NAME = re.compile(rf"(?:^|[-_.]){_SECRET_WORDS}(?:[-_](?:id|value|data))?$", re.IGNORECASE)
# The same inside of one word: a command line of its own, or JSON.
_SECRET_INSIDE = re.compile(rf"((?:\b|_|-){_SECRET_WORDS}[\"']?(?:\s*[=:]\s*|\s+)[\"']?)[^\s\"',}}]+", re.IGNORECASE)
HIDDEN = "…"


def visible(text: object) -> str:
    """Text whose control characters, marks of direction and lone surrogates became escapes. None becomes an empty text.

    Line feeds and tabulators stay.
    """
    return "" if text is None else _UNPRINTABLE.sub(_sign, str(text).replace("\r\n", "\n"))


def one_line(text: object) -> str:
    """Visible text on one line, each run of white space a blank."""
    return " ".join(visible(text).split())


def message(text: object) -> str:
    """Visible text of one line, without secrets, that no reader of a log takes for a command."""
    line = visible(text).replace("\n", "\\n").replace("\t", "\\t")
    return _without_commands(without_secrets(line))


def lines(text: object) -> str:
    """`message` for a text of several lines, which stay."""
    return _without_commands(without_secrets(visible(text)))


def without_secrets(text: str) -> str:
    """A text without tokens of the Hub, and without passwords and signatures in addresses."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def is_secret_name(name: str) -> bool:
    """Whether an option or a variable of this name holds a key, a token or a password."""
    return _SECRET_NAME.search(name.strip()) is not None


def shell(words: Iterable[str]) -> str:
    """A command as a POSIX shell takes it, on one line, every word quoted where it must be.

    A word with a line feed or another control character is written as `$'…'`, which bash and zsh read.
    """
    return " ".join(_shell_word(str(word)) for word in words)


def argument(name: object) -> str:
    """A file or folder as an argument that no command takes for an option."""
    text = str(name)
    return f"./{text}" if text.startswith("-") else text


def shell_without_secrets(words: Iterable[str]) -> str:
    """`shell`, with `…` in the place of every key, token and password that stands among the words."""
    shown: list[str] = []
    for before, secret in _with_secrets(words):
        if secret is None:
            shown.append(_shell_word(_SECRET_INSIDE.sub(rf"\1{HIDDEN}", without_secrets(before))))
        else:
            shown.append(f"{_shell_word(before)}={HIDDEN}" if before else HIDDEN)
    return " ".join(shown)


def secrets_among(words: Iterable[str]) -> frozenset[str]:
    """The keys, tokens and passwords that stand among the words of a command as words, or behind `=`."""
    words = list(words)
    found = {secret for _, secret in _with_secrets(words) if secret is not None}
    found |= {match[0][len(match[1]) :] for word in words for match in _SECRET_INSIDE.finditer(word)}
    return frozenset(found - {""})


def _with_secrets(words: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Each word of a command as (text, secret): a whole word that is a secret has no text, an option with `=` has its
    name, any other word has no secret."""
    is_secret = False
    for word in words:
        name, sign, value = word.partition("=")
        if is_secret:
            yield "", word
        elif sign and is_secret_name(name):
            yield name, value
        else:
            yield word, None
        is_secret = not is_secret and word.startswith("-") and not sign and is_secret_name(word)


def json_text(value: object, indent: int | None = 2) -> str:
    """A value as readable JSON, with invisible characters escaped in JSON's own way.

    Raises:
        ValueError: it holds a NaN or an infinity.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return _UNPRINTABLE.sub(lambda found: json.dumps(found[0])[1:-1], text)


def markdown(text: object) -> str:
    """Text on one line that Markdown and HTML leave as it is."""
    line = visible(text).replace("\n", " ")
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _MARKDOWN.sub(r"\\\1", line)
    line = _MARKDOWN_LINK.sub(lambda found: f"&#{ord(found[0])};", line)
    return _MARKDOWN_START.sub(r"\1\\", line)


def code(text: object) -> str:
    """Text in a code span of Markdown, where it makes no link and mentions nobody, whatever it contains."""
    line = one_line(text)
    if not line:
        return ""
    fence = "`" * (_longest_run(line) + 1)
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def fenced(text: object, language: str = "text") -> str:
    """Text in a fenced block of Markdown that nothing in it can close.

    Args:
        language: a word of our own.
    """
    content = visible(text)
    fence = "`" * max(3, _longest_run(content) + 1)
    return f"{fence}{language}\n{content}\n{fence}"


def cell(text: str) -> str:
    """A piece of Markdown that is already quoted, fit for a cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", text).replace("\n", " ")


def workflow_command(name: str, properties: Mapping[str, str], text: str) -> str:
    """A command for GitHub's runner on one line, escaped as GitHub's own toolkit does.

    Args:
        name: as `error`.
        properties: as `file` and `title`.
    Source: `command.ts` of github.com/actions/toolkit.
    """
    stated = ",".join(f"{key}={_property(value)}" for key, value in properties.items())
    return f"::{name}{' ' if stated else ''}{stated}::{_data(text)}"


def _without_commands(text: str) -> str:
    return _COMMAND.sub(lambda found: "#\\x23" if found[0].startswith("##") else f"{found[1]}\\x3a", text)


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _shell_word(word: str) -> str:
    if not (_UNPRINTABLE.search(word) or "\n" in word or "\t" in word):
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return f"$'{visible(escaped)}'"


def _data(text: str) -> str:
    # The order matters: `%` first. What cannot be seen is shown afterwards, so that no carriage return is lost.
    return visible(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _sign(match: re.Match[str]) -> str:
    point = ord(match[0])
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"
