"""Sources of code."""

from __future__ import annotations

from .readers import source_files
from .source import DOC, RUST, Source

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


def _code(name: str, package: str, patterns: tuple[str, ...], language: str, offline: int, heldout: int = 0) -> Source:
    cut = "This software is available under" if name == "stb" else None  # its licences stand at the end
    read = source_files(_HOLDERS.get(name, ""), cut)
    return Source(name, package, patterns, read, "code", language, offline, heldout)


_go = tuple(
    f"usr/share/go-1.19/src/{room}/*.go"
    for room in (
        "archive bufio bytes compress container context database encoding go html image index log mime net os regexp "
        "sort strings sync text time"
    ).split()
)
_ruby = tuple(
    f"usr/lib/ruby/3.1.0/{name}.rb"
    for name in (
        "csv csv/* delegate erb erb/* fileutils find forwardable irb/* json/* logger logger/* net/* open-uri optparse "
        "ostruct pstore securerandom set shellwords tempfile time tsort uri/*"
    ).split()
)
_faker = ("usr/share/php/Faker/[A-OQ-Z]*.php", "usr/share/php/Faker/Provider/[A-Z]*.php")  # not the lists of names
_bats = ("usr/libexec/bats-core/*", "usr/lib/bats-core/*.bash")
_shunit2 = ("usr/share/shunit2/*", f"{DOC}shunit2/examples/*.sh")

CODE: tuple[Source, ...] = (
    _code("python-library", "libpython3.11-stdlib", ("usr/lib/python3.11/*.py",), "python", 260_000, 16_000),
    _code("go-library", "golang-1.19-src", _go, "go", 170_000, 10_000),
    _code("rust-library", "rust-src", (f"{RUST}library/*/src/*.rs",), "rust", 155_000, 10_000),
    _code("stb", "libstb-dev", ("usr/include/stb/stb_*.h",), "c", 115_000, 9_000),
    _code("nlohmann-json", "nlohmann-json3-dev", ("usr/include/nlohmann/detail/*.hpp",), "c++", 60_000),
    _code("abseil", "libabsl-dev", ("usr/include/absl/*.h",), "c++", 100_000, 8_000),
    _code("three", "three", ("src/*.js",), "javascript", 70_000, 5_000),
    _code("lodash", "node-lodash", ("usr/share/nodejs/lodash/*.js",), "javascript", 30_000),
    _code("express", "express", ("lib/*.js",), "javascript", 40_000),
    _code("rxjs", "rxjs", ("src/internal/*.ts",), "typescript", 80_000, 5_000),
    _code("immer", "immer", ("src/*.ts",), "typescript", 25_000),
    _code("bootstrap", "bootstrap", ("scss/*.scss",), "scss", 35_000, 3_000),
    _code("ruby-library", "libruby3.1", _ruby, "ruby", 80_000, 6_000),
    _code("jpype", "JPype1", ("native/*.java",), "java", 60_000, 5_000),
    _code("php-faker", "php-faker", _faker, "php", 35_000, 4_000),
    _code("bats", "bats", _bats, "shell", 30_000),
    _code("shunit2", "shunit2", _shunit2, "shell", 20_000, 3_000),
    _code("penlight", "lua-penlight", ("usr/share/lua/5.1/pl/*.lua",), "lua", 50_000, 4_000),
    _code("alexandria", "cl-alexandria", ("usr/share/common-lisp/source/alexandria/*.lisp",), "common-lisp", 40_000),
    _code("postgresql-sql", "postgresql-15", ("usr/share/postgresql/15/*_[fs]*.sql",), "sql", 40_000),
)
