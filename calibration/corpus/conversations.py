"""Sources of dialogue."""

from __future__ import annotations

from .dialogue import chats, compiler_errors, faq_pages, faq_text, glossary
from .readers import Reader
from .source import BODY, DOC, RUST, SECTION, Source


def _faq(
    name: str, package: str, path: str, read: Reader, offline: int, heldout: int = 0, language: str = "en"
) -> Source:
    return Source(name, package, (path,), read, "dialogue", language, offline, heldout)


def _chat(folder: str, language: str, offline: int, heldout: int = 0) -> Source:
    # Topics that are facts or small talk; the others are opinions, jokes and the bot's own profile.
    without = frozenset(
        "botprofile coding emotion gossip humor movies politics profile psychology sports swear".split()
    )
    read = chats(folder, without=without)
    patterns = ("chatterbot_corpus/data/*.yml",)
    return Source("chatterbot", "chatterbot-corpus", patterns, read, "dialogue", language, offline, heldout)


_python = f"{DOC}python3.11/html/"
_sklearn = f"{DOC}python-sklearn-doc/html/"
_errors = f"{RUST}compiler/rustc_error_codes/src/error_codes/E*.md"
_curl = faq_text(r" ?\d\.\d+ (.+)", r"(?m)^1\. Philosophy\n\n  1")
_w3m = faq_pages(BODY, r"(?:#+ )?\*\* ?([^*]+[?？.]) ?\*\*")  # noqa: RUF001

DIALOGUE: tuple[Source, ...] = (
    _faq("python-faq", "python3.11-doc", f"{_python}faq/*.html", faq_pages(), 180_000, 12_000),
    _faq("python-faq", "python3.11-doc", f"{_python}glossary.html", glossary("Python"), 50_000),
    _faq("rust-errors", "rust-src", _errors, compiler_errors, 300_000, 14_000),
    _faq(
        "sqlalchemy-docs", "python-sqlalchemy-doc", f"{DOC}python-sqlalchemy-doc/html/faq/*", faq_pages(), 90_000, 9_000
    ),
    _faq("django-docs", "python-django-doc", f"{DOC}python-django-doc/html/faq/*", faq_pages(SECTION), 60_000, 6_000),
    _faq("sqlite-docs", "sqlite3-doc", f"{DOC}sqlite3/faq.html", faq_pages(BODY, r"\*\*\(\d+\) (.+?)\*\*"), 40_000),
    _faq("sklearn-docs", "python-sklearn-doc", f"{_sklearn}faq.html", faq_pages(), 30_000),
    _faq("sklearn-docs", "python-sklearn-doc", f"{_sklearn}glossary.html", glossary("scikit-learn"), 70_000),
    _faq("llvm-docs", "llvm-15-doc", f"{DOC}llvm-15-doc/html/FAQ.html", faq_pages(), 20_000),
    _faq("lxml-docs", "python-lxml-doc", f"{DOC}python-lxml/html/FAQ.html", faq_pages(BODY), 60_000),
    _faq("docutils-docs", "docutils-doc", f"{DOC}docutils-doc/FAQ.html", faq_pages(BODY, r"#{1,4} (.+)"), 50_000),
    _faq("curl-docs", "libcurl4-doc", f"{DOC}libcurl4/FAQ.gz", _curl, 70_000),
    _faq(
        "postgresql-docs",
        "postgresql-doc-15",
        f"{DOC}postgresql-doc-15/html/glossary.html",
        glossary("PostgreSQL", BODY),
        35_000,
    ),
    _faq("w3m-docs", "w3m", f"{DOC}w3m/ja/FAQ.html", _w3m, 12_000, language="ja"),
    _faq("w3m-docs", "w3m", f"{DOC}w3m/de/FAQ.html", _w3m, 18_000, language="de"),
    _chat("english", "en", 45_000, 4_000),
    _chat("japanese", "ja", 20_000),
    _chat("korean", "ko", 12_000, 2_000),
    _chat("chinese", "zh", 12_000),
    _chat("spanish", "es", 12_000),
    _chat("italian", "it", 12_000),
    _chat("portuguese", "pt", 9_000),
    _chat("ukrainian", "uk", 14_000),
    _chat("russian", "ru", 8_000),
    _chat("german", "de", 6_000),
    _chat("french", "fr", 6_000, 2_000),
    _chat("turkish", "tr", 6_000),
    _chat("indonesian", "id", 8_000),
    _chat("dutch", "nl", 8_000),
)
