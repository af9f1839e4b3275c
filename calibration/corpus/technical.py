"""Sources of technical prose: documentation, manuals and guides."""

from __future__ import annotations

from .markup import WHOLE
from .readers import Reader, markdown_files, pages, tex_files
from .source import BODY, DOC, MAIN, RUST, SECTION, Source, html


def _technical(
    name: str, package: str, patterns: tuple[str, ...], read: Reader, offline: int, heldout: int = 0
) -> Source:
    return Source(name, package, patterns, read, "technical", "en", offline, heldout)


_rust_books = (
    *(f"{RUST}src/doc/{book}/src/*.md" for book in ("book", "reference", "nomicon", "rust-by-example")),
    f"{RUST}src/doc/book/listings/*.rs",
)
_python = html("python3.11", "tutorial/*", "howto/*", "whatsnew/*", "using/*", "extending/*")
_django = html("python-django-doc", "intro/*", "topics/*", "howto/*", "misc/*")
# Without lists of links and names, legal forms, tables, and blurbs that others wrote.
_sqlite = pages(
    BODY,
    without="/(faq|books|crew|consortium|copyright|keyword|doc_|doclist|sitemap|famous|prosupport|support|hp1|lts|press"
    "|docs|syntax|c3ref/(obj|func|const)list|index|chronology|search|download)",
)
_postgresql = pages(
    BODY,
    without="/(glossary|errcodes|features|sql-keywords|unsupported|catalog|view-|infoschema|bookindex|biblio|acronyms)",
)
_curl = (f"{DOC}libcurl4/*.md", f"{DOC}libcurl4/*.md.gz")
_tutorial = (f"{DOC}python-biopython-doc/Doc/Tutorial/chapter_*.tex.gz",)
_pandas = html("python-pandas-doc", "user_guide/*", "getting_started/*")
_scrapy = html("python-scrapy-doc", "intro/*", "topics/*")
_pytest = html("python-pytest-doc", "how-to/*", "explanation/*", "example/*")
_flask = html("python-flask-doc", "*", "patterns/*", "tutorial/*", "deploying/*")
_werkzeug = html("python-werkzeug-doc", "*", "deployment/*", "middleware/*")
_sphinx = html("sphinx-doc", "usage/*", "tutorial/*", "development/*", "extdev/*")
_dask = html("python-dask-doc", "[!gc]*", "how-to/*")
# Indexes of names, lists of changes, texts of licences, and pages of a theme.
_without = "/(genindex|py-modindex|search|index|changes|changelog|license|news|contributing|authors|internals/release)"
_pages, _main_pages = pages(without=_without), pages(MAIN, without=_without)

# The held-out set alone takes the last two.
TECHNICAL: tuple[Source, ...] = (
    _technical("rust-books", "rust-src", _rust_books, markdown_files("listings/"), 280_000, 14_000),
    _technical("python-docs", "python3.11-doc", _python, pages(), 300_000, 16_000),
    _technical("sqlite-docs", "sqlite3-doc", (f"{DOC}sqlite3/*.html",), _sqlite, 250_000, 14_000),
    _technical("django-docs", "python-django-doc", _django, pages(SECTION), 220_000, 10_000),
    _technical(
        "fastapi-docs", "fastapi", ("docs/en/docs/*.md", "docs_src/*.py"), markdown_files("docs_src/"), 120_000, 8_000
    ),
    _technical("postgresql-docs", "postgresql-doc-15", html("postgresql-doc-15", "*"), _postgresql, 200_000, 8_000),
    _technical("biopython-docs", "python-biopython-doc", _tutorial, tex_files, 80_000, 6_000),
    _technical("curl-docs", "libcurl4-doc", _curl, markdown_files(), 60_000, 5_000),
    _technical("llvm-docs", "llvm-15-doc", html("llvm-15-doc", "[!AF]*"), pages(), 120_000, 5_000),
    _technical("ghc-docs", "ghc-doc", html("ghc-doc", "users_guide/*"), pages(), 80_000, 5_000),
    _technical("go-docs", "golang-1.19-doc", html("golang-1.19-doc", "go_*"), pages(WHOLE), 30_000),
    _technical("pandas-docs", "python-pandas-doc", _pandas, _main_pages, 200_000),
    _technical("scrapy-docs", "python-scrapy-doc", _scrapy, _pages, 150_000),
    _technical("pytest-docs", "python-pytest-doc", _pytest, _pages, 130_000),
    _technical("flask-docs", "python-flask-doc", _flask, _pages, 110_000),
    _technical("werkzeug-docs", "python-werkzeug-doc", _werkzeug, _pages, 90_000),
    _technical("sphinx-docs", "sphinx-doc", _sphinx, _pages, 150_000),
    _technical("dask-docs", "python-dask-doc", _dask, _main_pages, 150_000),
    _technical("click-docs", "python-click-doc", html("python-click-doc", "*"), _pages, 0, 14_000),
    _technical("attrs-docs", "python-attr-doc", html("python-attr-doc", "*"), _pages, 0, 12_000),
)
