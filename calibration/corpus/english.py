"""Sources of English prose and of mathematics."""

from __future__ import annotations

from .markup import WHOLE
from .readers import Reader, markdown_files, novels, pages, source_files, tex_files, theorems, work
from .source import ARTICLE, BODY, DOC, FAKER, MAIN, RUST, SECTION, Source


def _prose(name: str, package: str, patterns: tuple[str, ...], read: Reader, offline: int, heldout: int = 0) -> Source:
    # The held-out chapters of Jane Austen are a novel of their own.
    units = "northangerabbey/" if name == "austen" else ""
    return Source(name, package, patterns, read, "prose", "en", offline, heldout, units)


def _html(folder: str, *pages_below: str) -> tuple[str, ...]:
    return tuple(f"{DOC}{folder}/html/{path}.html" for path in pages_below)


_opticks = work(
    begin="\nTHE FIRST BOOK OF OPTICKS", replace=(r"\[Illustration[^\]]*\]|\[[A-Z]\]|_(?=\w)|(?<=[\w.,])_", "")
)
_bierce = work(begin="\nABASEMENT, n", replace=(r"(?m)^ {40,}(?=[A-Z])", "    -- "))
_jargon = work(
    begin=r"\n   :abbrev:",
    end=r"\n\s*Bibliography\n\s+Here",
    replace=(r"(?m)^ {3}[^\s:.,][^.:,\n]{0,38}\n(?=\n)|^ {3}|[{}]", ""),
)
_rust_books = (
    *(f"{RUST}src/doc/{book}/src/*.md" for book in ("book", "reference", "nomicon", "rust-by-example")),
    f"{RUST}src/doc/book/listings/*.rs",
)
_python = _html("python3.11", "tutorial/*", "howto/*", "whatsnew/*", "using/*", "extending/*")
_django = _html("python-django-doc", "intro/*", "topics/*", "howto/*", "misc/*")
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
_opticks_file = ("usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt",)
_austen_files = ("usr/lib/R/site-library/janeaustenr/data/Rdata.rd[bx]",)

PROSE: tuple[Source, ...] = (
    _prose("austen", "r-cran-janeaustenr", _austen_files, novels, 430_000, 28_000),
    _prose("carroll", "php-faker", (f"{FAKER}en_US/Text.php",), work(r"CHAPTER [IVX]+\. "), 110_000, 9_000),
    _prose("newton", "golang-1.19-src", _opticks_file, _opticks, 120_000, 8_000),
    _prose("bierce", "dict-devil", ("usr/share/dictd/devil.dict.dz",), _bierce, 110_000, 8_000),
    _prose("jargon", "jargon-text", (f"{DOC}jargon-text/jargon.txt.gz",), _jargon, 220_000, 14_000),
    _prose("us-founding", "miscfiles", ("usr/share/state/us-constitution.gz",), work(), 45_000),
    _prose("us-founding", "miscfiles", ("usr/share/state/us-declaration.gz",), work(), 0, 9_000),
    _prose("rust-books", "rust-src", _rust_books, markdown_files("listings/"), 230_000, 14_000),
    _prose("python-docs", "python3.11-doc", _python, pages(), 270_000, 16_000),
    _prose("sqlite-docs", "sqlite3-doc", (f"{DOC}sqlite3/*.html",), _sqlite, 230_000, 14_000),
    _prose("django-docs", "python-django-doc", _django, pages(SECTION), 170_000, 10_000),
    _prose(
        "fastapi-docs", "fastapi", ("docs/en/docs/*.md", "docs_src/*.py"), markdown_files("docs_src/"), 120_000, 8_000
    ),
    _prose("postgresql-docs", "postgresql-doc-15", _html("postgresql-doc-15", "*"), _postgresql, 140_000, 8_000),
    _prose("biopython-docs", "python-biopython-doc", _tutorial, tex_files, 80_000, 6_000),
    _prose("curl-docs", "libcurl4-doc", _curl, markdown_files(), 60_000, 5_000),
    _prose("llvm-docs", "llvm-15-doc", _html("llvm-15-doc", "[!AF]*"), pages(), 70_000, 5_000),
    _prose("ghc-docs", "ghc-doc", _html("ghc-doc", "users_guide/*"), pages(), 60_000, 5_000),
    _prose("go-docs", "golang-1.19-doc", _html("golang-1.19-doc", "go_*"), pages(WHOLE), 30_000),
)


def _mathematics(
    name: str,
    package: str,
    patterns: tuple[str, ...],
    read: Reader,
    offline: int,
    heldout: int = 0,
    language: str = "en",
) -> Source:
    return Source(name, package, patterns, read, "mathematics", language, offline, heldout)


_mpmath = _html("python-mpmath-doc", "calculus/*", "functions/*", "matrices*", "ident*")
_sympy = _html("python-sympy-doc", "tutorials/intro*", "guides/solving/*", "modules/*", "explanation/*", "reference/*")
_sklearn = _html("python-sklearn-doc", "modules/[abd-fh-z]*", "modules/g[ar]*")  # not classes, not generated
_hol = ("usr/share/hol-light/100/*.ml", "usr/share/hol-light/Library/*.ml")
_set_mm = ("usr/share/metamath/databases/set.mm",)
_scipy = _html("python-scipy-doc", "tutorial/[!i]*")
_statsmodels = _html(
    "python-statsmodels-doc",
    *"con* diagnostic discretemod distributions duration emplike gam gee glm gmm imputation mixed* mul* non*".split(),
    *"regression rlm* statespace stats tsa vector_ar".split(),
)

MATHEMATICS: tuple[Source, ...] = (
    _mathematics("mpmath-docs", "python-mpmath-doc", _mpmath, pages(), 140_000, 10_000),
    _mathematics("sympy-docs", "python-sympy-doc", _sympy, pages(ARTICLE), 170_000, 10_000),
    _mathematics("sklearn-docs", "python-sklearn-doc", _sklearn, pages(), 160_000, 10_000),
    _mathematics("scipy-docs", "python-scipy-doc", _scipy, pages(MAIN), 110_000, 6_000),
    _mathematics("statsmodels-docs", "python-statsmodels-doc", _statsmodels, pages(), 40_000),
    _mathematics("set.mm", "metamath-databases", _set_mm, theorems, 130_000, 10_000, "metamath"),
    _mathematics("hol-light", "hol-light", _hol, source_files(), 90_000, 6_000, "hol-light"),
)
