"""All sources of the bundled text."""

from __future__ import annotations

from .conversations import DIALOGUE
from .english import MATHEMATICS, PROSE
from .languages import LANGUAGES
from .programs import CODE
from .source import Source
from .technical import TECHNICAL

SOURCES: tuple[Source, ...] = (*PROSE, *TECHNICAL, *CODE, *LANGUAGES, *MATHEMATICS, *DIALOGUE)
