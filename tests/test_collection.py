"""Collecting the tests stays quick: it imports nothing slow, and a rule over many files is one test."""

from __future__ import annotations

import pytest
from support.collecting import IMPORTED

# Each test in these files checks a rule in a loop, and names every offender at once. A few check the rules themselves.
RULES = {"test_layering.py", "test_plain_english.py", "test_documents.py"}
CHECK_THE_RULES = {"test_each_rule_finds_its_faults", "test_a_wrong_command_would_be_seen"}


def test_no_test_module_imports_what_is_slow_to_import(request: pytest.FixtureRequest) -> None:
    assert request.config.stash[IMPORTED] == set()


def test_each_rule_is_one_test(request: pytest.FixtureRequest) -> None:
    items = [item for item in request.session.items if item.path.name in RULES and isinstance(item, pytest.Function)]
    assert [
        item.nodeid for item in items if hasattr(item, "callspec") and item.originalname not in CHECK_THE_RULES
    ] == []
