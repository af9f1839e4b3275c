"""Turning HTML, Markdown and TeX documentation into plain Markdown."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

_BLOCKS = frozenset(
    "p div section article main ul ol li dl dt dd table tr blockquote h1 h2 h3 h4 h5 h6 hr pre figure header".split()
)
_IGNORED = frozenset("script style nav footer button form svg head aside select".split())
_IGNORED_CLASSES = frozenset(
    (
        "headerlink toctree-wrapper toctree contents local navheader navfooter toc topic menu sphinxsidebar related "
        "linenos viewcode-link nosearch fancy_toc sr-only nav mainmenu versionmodified docinfo clearer sphx-glr-thumb "
        "admonition-deprecated prev-next-area refnamediv sidebar-wrapper index-xref changeset-link buttons line-numbers"
    ).split()
)
_VOID = frozenset("img br hr input meta link col area base embed source track wbr".split())
_MARKS = {"code": "`", "tt": "`", "kbd": "`", "samp": "`", "em": "*", "i": "*", "cite": "*", "strong": "**", "b": "**"}

_LANGUAGES = {"python3": "python", "python": "python", "pycon3": "python", "pycon": "python", "default": "python"}
_LANGUAGES |= {"console": "console", "shell": "shell", "bash": "bash", "sql": "sql", "c": "c", "c++": "cpp"}
_LANGUAGES |= {"html": "html", "html+django": "html", "json": "json", "haskell": "haskell", "llvm": "llvm"}

# Japanese and Chinese join lines without a blank.
_WIDE_BREAK = re.compile("(?<=[\u3000-\u9fff\uff00-\uffef])\n(?=[\u3000-\u9fff\uff00-\uffef])")
# The root of a page that is only a fragment.
WHOLE = ("", "", "")


class _Markdown(HTMLParser):
    """Collects Markdown blocks from the part of a page below the first tag that ``is_root`` accepts."""

    def __init__(self, root: tuple[str, str, str]) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self._root = root
        self._stack: list[tuple[str, bool, bool]] = []  # tag, opens the root, is ignored
        self._inside = root == WHOLE
        self._ignored = 0
        self._inline: list[str] = []
        self._lists: list[tuple[str, int]] = []
        self._bullet = ""
        self._fence: str | None = None
        self._language = ""
        self._math = False
        self._marks = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        classes = set(values.get("class", "").split())
        if tag in _VOID:
            self._void(tag, values, classes)
            return
        ignored = tag in _IGNORED or bool(classes & _IGNORED_CLASSES)
        opens = not self._inside and self._is_root(tag, values)
        self._close_implied(tag)
        self._stack.append((tag, opens, ignored))
        self._ignored += ignored
        self._inside = self._inside or opens
        if self._inside and not self._ignored:
            self._start(tag, classes)

    def handle_endtag(self, tag: str) -> None:
        if not any(open_tag == tag for open_tag, _, _ in self._stack):
            return
        while self._stack:
            open_tag, opens, ignored = self._stack.pop()
            if self._inside and not self._ignored:
                self._end(open_tag)
            self._ignored -= ignored
            if opens:
                self._inside = False
            if open_tag == tag:
                break

    def handle_data(self, data: str) -> None:
        if self._inside and not self._ignored:
            self._inline.append(data if self._fence is not None else re.sub(r"\s+", " ", _WIDE_BREAK.sub("", data)))

    def close(self) -> None:
        super().close()
        self._flush()

    def _is_root(self, tag: str, values: dict[str, str]) -> bool:
        root_tag, name, value = self._root
        return tag == root_tag and (not name or value in values.get(name, "").split())

    def _close_implied(self, tag: str) -> None:
        # HTML lets </p> and </li> be left out; both end at the next block of their kind.
        if self._stack and (self._stack[-1][0], tag in _BLOCKS) == ("p", True):
            self.handle_endtag("p")
        for group in ({"li"}, {"dt", "dd"}, {"tr"}, {"td", "th"}):
            if tag in group and self._stack and self._stack[-1][0] in group:
                self.handle_endtag(self._stack[-1][0])

    def _void(self, tag: str, values: dict[str, str], classes: set[str]) -> None:
        if not self._inside or self._ignored:
            return
        if tag == "br":
            self._inline.append("\n")
        elif tag == "img" and "math" in classes:
            sign = "$$" if self._math else "$"
            self._inline.append(sign + " ".join(values.get("alt", "").split()) + sign)
        elif tag == "hr":
            self._flush()

    def _start(self, tag: str, classes: set[str]) -> None:
        if self._fence is not None:
            return
        if tag in _BLOCKS:
            self._flush()
        if tag == "div":
            self._note_language(classes)
        if tag in {"ul", "ol"}:
            self._lists.append((tag, 0))
        elif tag == "li" and self._lists:
            kind, count = self._lists[-1]
            self._lists[-1] = (kind, count + 1)
            self._bullet = "- " if kind == "ul" else f"{count + 1}. "
        elif tag == "pre":
            self._fence = self._language
        elif tag == "div" and "math" in classes:
            self._math = True
        elif tag in {"td", "th"}:
            self._inline.append(" | " if "".join(self._inline).strip() else "")
        elif tag in _MARKS:
            self._marks += 1
            self._inline.append(_MARKS[tag] if self._marks == 1 and not self._in("dt") else "")
        elif "classifier" in classes:
            self._inline.append(" : ")

    def _end(self, tag: str) -> None:
        if self._fence is not None and tag != "pre":
            return
        if tag == "pre":
            code = "".join(self._inline).strip("\n")
            self._inline = []
            self._add(f"```{self._fence}\n{code}\n```" if code.strip() else "")
            self._fence = None
        elif tag in {"h1", "h2", "h3", "h4", "h5", "h6"}:
            self._inline.insert(0, "#" * int(tag[1]) + " ")
            self._flush()
        elif tag in _MARKS:
            self._marks = max(self._marks - 1, 0)
            self._inline.append(_MARKS[tag] if self._marks == 0 and not self._in("dt") else "")
        elif tag == "dt":
            self._end_term()
        elif tag in _BLOCKS:
            self._flush()
        if tag in {"ul", "ol"} and self._lists:
            self._lists.pop()
            self._bullet = ""
        elif tag == "div":
            self._math = False

    def _in(self, tag: str) -> bool:
        return any(open_tag == tag for open_tag, _, _ in self._stack)

    def _end_term(self) -> None:
        term = " ".join("".join(self._inline).split())
        mark = "`" if "(" in term or " : " in term else "**"
        self._inline = [f"{mark}{term}{mark}" if term and not set("`$") & set(term) else term]
        self._flush()

    def _note_language(self, classes: set[str]) -> None:
        for name in classes:
            if name.startswith("highlight-"):
                language = name.removeprefix("highlight-")
                self._language = _LANGUAGES.get(language, "")

    def _flush(self) -> None:
        text = "".join(self._inline)
        self._inline = []
        text = "\n".join(" ".join(line.split()) for line in text.split("\n")).strip()
        for mark in ("**", "*", "`"):
            text = text.replace(f" {mark}{mark} ", " ")
        if text.strip("#*` |"):
            self._add(text)

    def _add(self, block: str) -> None:
        if not block:
            return
        depth = max(len(self._lists) - 1, 0)
        indent = "  " * depth
        if self._bullet:
            lead, self._bullet = self._bullet, ""
            rest = indent + " " * len(lead)
        else:
            lead = "" if not self._lists else "  "
            rest = indent + lead
        lines = block.split("\n")
        text = [indent + lead + lines[0], *(rest + line if line else "" for line in lines[1:])]
        self.blocks.append("\n".join(text))


def markdown_of(page: str, root: tuple[str, str, str] = ("div", "role", "main")) -> str:
    """Return the part of an HTML page below ``root`` (tag, attribute, value) as Markdown.

    Tables become lines with "|", definition terms their own paragraphs, links and images their text; formulas that
    Sphinx wrote as ``\\(..\\)``, ``\\[..\\]`` or images get ``$`` and ``$$``. Block quotes stay plain paragraphs, since
    most generators indent with them.
    """
    parser = _Markdown(root)
    parser.feed(page)
    parser.close()
    text = ""
    previous_item = False
    for block in parser.blocks:
        item = bool(re.match(r"\s*(- |\d+\. )", block))
        text += ("\n" if item and previous_item else "\n\n") + block
        previous_item = item
    return _dollar_math(text).strip("\n")


def _dollar_math(text: str) -> str:
    text = re.sub(r"\\\((.+?)\\\)", r"$\1$", text, flags=re.DOTALL)
    return re.sub(r"\\\[(.+?)\\\]", lambda found: "$$" + found[1].strip() + "$$", text, flags=re.DOTALL)


_INCLUDE = re.compile(r"\{[!{]\s*(?:#\w+\s+)?([^!}\s:]+)(?::(\w+))?\s*[!}]\}")
_BLOCK_OF_INCLUDES = re.compile(r"(?m)^([ \t]*)```[^\n]*\n(?:[ \t]*\{[!{][^\n]*\n)+[ \t]*```[ \t]*$")


def plain_markdown(text: str, included: dict[str, str], include_root: str = "") -> str:
    """Return Markdown without HTML, link targets and the marks of its site generator.

    A code block made of include directives is filled from ``included`` (by path from ``include_root`` on) and dropped
    when that file is not there. Admonitions become a bold title and plain paragraphs.
    """

    def fill(found: re.Match[str]) -> str:
        codes = []
        for target, anchor in _INCLUDE.findall(found[0]):
            code = included.get(include_root + target.split(include_root)[-1]) if include_root else None
            if code is None:
                return ""
            codes.append(_anchored(code, anchor))
        language = re.match(r"\s*```(\w*)", found[0])
        assert language is not None
        return f"```{language[1].lower()}\n" + "\n".join(codes) + "\n```" if codes else ""

    text = _dedent_admonitions(_BLOCK_OF_INCLUDES.sub(fill, text))
    pieces = re.split(r"(?ms)(^[ \t]*(?:> ?)?```.*?^[ \t]*(?:> ?)?```[ \t]*$)", text)
    return "".join(_plain_fence(piece) if n % 2 else _strip_inline(piece) for n, piece in enumerate(pieces))


def _anchored(code: str, anchor: str) -> str:
    found = (
        re.search(rf"ANCHOR: {anchor}\n(.*?)[^\n]*ANCHOR_END: {anchor}\b", code, flags=re.DOTALL) if anchor else None
    )
    return re.sub(r"(?m)^.*ANCHOR(_END)?:.*\n?", "", found[1] if found else code).strip("\n")


def _plain_fence(fence: str) -> str:
    head, _, rest = fence.partition("\n")
    language = re.sub(r"(```\w*).*", r"\1", head.replace("Python", "python").replace("JSON", "json"))
    language = re.sub(r"```(compile_fail|edition\d*|hl_lines|ignore|text|should_panic|no_run).*", "```", language)
    rest = re.sub(r"</?(?:span|font|b|u|i)\b[^>]*>", "", rest)
    if "rust" in head:  # lines that the Rust books hide
        rest = re.sub(r"(?m)^# .*\n|^#\n", "", rest)
    return f"{language}\n{rest}"


def _strip_inline(text: str) -> str:
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for label in sorted(set(re.findall(r"(?m)^\[([^\]]+)\]:", text))):
        text = text.replace(f"[{label}]: ", "[link]: ").replace(f"[{label}]", label)
    text = re.sub(r"(?m)^\[[^\]]+\]:\s*\S+.*$", "", html.unescape(text))
    text = re.sub(r"(?m)^(!{3}|\?{3}|/{3}).*$|^.*\{[{!%].*$", "", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]\[]+)\]\([^)\s]*(?:\s+\"[^\"]*\")?\)(\{[^}]*\})?", r"\1", text)
    text = re.sub(r"\[([^\]\[]+)\]\[[^\]]*\]", r"\1", text)
    text = re.sub(r"\{\s*[#.:][^}\n]*\}", "", text)
    codes = re.split(r"(`[^`\n]+`)", text)
    return "".join(re.sub(r"</?[a-zA-Z][^<>]*>", "", part) if n % 2 == 0 else part for n, part in enumerate(codes))


def _dedent_admonitions(text: str) -> str:
    lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        found = re.match(r"(?:!!!|\?\?\?\+?|===)\s*(\w*)\s*(?:\"([^\"]*)\")?", line)
        if found:
            inside = True
            title = found[2] if found[2] is not None else found[1].capitalize()
            lines += [f"**{title}**", ""] if title else []
        elif inside and (line.startswith("    ") or not line.strip()):
            lines.append(line[4:])
        else:
            inside = False
            lines.append(line)
    return "\n".join(lines)


def plain_tex(text: str) -> str:
    """Return LaTeX prose without comments, labels and index entries."""
    text = re.sub(r"(?m)^%.*\n|(?<!\\)%.*$", "", text)
    text = re.sub(r"\\(?:label|index|cite)(?:\[[^\]]*\])?\{[^}]*\}", "", text)
    return re.sub(r"\\href\{[^}]*\}\{([^}]*)\}", r"\1", text)
