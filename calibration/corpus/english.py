"""Sources of literary English prose and of mathematics."""

from __future__ import annotations

from .readers import Reader, novels, pages, source_files, theorems, work
from .source import ARTICLE, DOC, FAKER, MAIN, Source, html


def _prose(name: str, package: str, patterns: tuple[str, ...], read: Reader, offline: int, heldout: int = 0) -> Source:
    # The held-out chapters of Jane Austen are a novel of their own.
    units = "northangerabbey/" if name == "austen" else ""
    return Source(name, package, patterns, read, "prose", "en", offline, heldout, units)


_opticks = work(
    begin="\nTHE FIRST BOOK OF OPTICKS", replace=(r"\[Illustration[^\]]*\]|\[[A-Z]\]|_(?=\w)|(?<=[\w.,])_", "")
)
_bierce = work(begin="\nABASEMENT, n", replace=(r"(?m)^ {40,}(?=[A-Z])", "    -- "))
_jargon = work(
    begin=r"\n   :abbrev:",
    end=r"\n\s*Bibliography\n\s+Here",
    replace=(r"(?m)^ {3}[^\s:.,][^.:,\n]{0,38}\n(?=\n)|^ {3}|[{}]", ""),
)
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


_mpmath = html("python-mpmath-doc", "calculus/*", "functions/*", "matrices*", "ident*")
_sympy = html("python-sympy-doc", "tutorials/intro*", "guides/solving/*", "modules/*", "explanation/*", "reference/*")
_sklearn = html("python-sklearn-doc", "modules/[abd-fh-z]*", "modules/g[ar]*")  # not classes, not generated
_hol = ("usr/share/hol-light/100/*.ml", "usr/share/hol-light/Library/*.ml")
_set_mm = ("usr/share/metamath/databases/set.mm",)
_scipy = html("python-scipy-doc", "tutorial/[!i]*")
_statsmodels = html(
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
