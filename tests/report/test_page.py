"""The page as a browser shows it: no request, no error, no horizontal scroll, the verdict at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from nvquant.report import write_report
from support import reports
from support.chromium import Tab, chromium, find_chromium

DOCUMENTS = {"good": reports.good, "failing": reports.failing, "bare": reports.bare, "deep": lambda: reports.good(126)}
SIZES = {"desk": (1280, 800), "telephone": (390, 844)}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    browser = find_chromium()
    if browser is None:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    with chromium(browser, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_page_renders(tab: Tab, tmp_path: Path, name: str, size: str, scheme: str) -> None:
    page = write_report(DOCUMENTS[name](), tmp_path)[0].as_uri()
    width, height = SIZES[size]
    tab.open(page, width, height, scheme)

    assert [event["request"]["url"] for event in tab.seen("Network.requestWillBeSent")] == [page]
    for kind in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
        assert tab.seen(kind) == []
    assert tab.value("document.documentElement.scrollWidth") <= width
    verdict = "document.querySelector('section.verdict h2')"
    assert 0 <= tab.value(f"{verdict}.getBoundingClientRect().top") < height / 2
    assert tab.value(f"{verdict}.innerText").split()[-1] == ("Failed" if name == "failing" else "Passed")
    # What sticks out of its section would be cut off or overlap.
    wide = "[...document.querySelectorAll('section > *')].filter(e => e.getBoundingClientRect().right > innerWidth)"
    assert tab.value(f"{wide}.map(e => e.outerHTML.slice(0, 80))") == []


def test_schemes_differ_and_paper_is_white(tab: Tab, tmp_path: Path) -> None:
    page = write_report(reports.good(), tmp_path)[0].as_uri()
    colour = "getComputedStyle(document.body).backgroundColor"
    tab.open(page, 1280, 800, "light")
    light = tab.value(colour)
    tab.open(page, 1280, 800, "dark")
    assert tab.value(colour) != light
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert tab.value(colour) == "rgb(255, 255, 255)"
    assert len(tab.call("Page.printToPDF")["data"]) > 10_000


def test_contrast_is_enough_to_read(tab: Tab, tmp_path: Path) -> None:
    page = write_report(reports.failing(), tmp_path)[0].as_uri()
    for scheme in ("light", "dark"):
        tab.open(page, 1280, 800, scheme)
        for selector in (".subtitle", ".verdict h2", ".words", ".stages li", ".tiles dt", ".checks .found", "caption"):
            assert tab.value(CONTRAST.replace("SELECTOR", selector)) >= 4.5, (scheme, selector)


def test_answers_are_text_and_nothing_else(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_report(reports.failing(), tmp_path)[0].as_uri(), 1280, 800)
    assert tab.value("document.title") == "Failed: gemma-4-31b-nvfp4"
    assert tab.value("document.querySelectorAll('script, img, iframe, object').length") == 0
    assert "<script>document.title = 'taken'</script>" in tab.value("document.body.innerText")


def test_all_ids_are_unique_and_every_chart_is_named(tab: Tab, tmp_path: Path) -> None:
    tab.open(write_report(reports.good(), tmp_path)[0].as_uri(), 1280, 800)
    ids = tab.value("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    named = tab.value(
        "[...document.querySelectorAll('[aria-labelledby]')].flatMap(e => e.getAttribute('aria-labelledby').split(' '))"
    )
    assert set(named) <= set(ids)
    assert tab.value(
        "[...document.querySelectorAll('svg')].every(e => e.querySelector('title') && e.querySelector('desc'))"
    )
    assert tab.value("[...document.querySelectorAll('table')].every(e => e.caption.textContent.trim())")
    levels = tab.value("[...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


# WCAG's contrast ratio of an element's text to the first background behind it that is opaque.
CONTRAST = """(() => {
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const element = document.querySelector('SELECTOR');
  let behind = element;
  while (parts(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const both = [parts(getComputedStyle(element).color), parts(getComputedStyle(behind).backgroundColor)].map(light);
  return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
})()"""
