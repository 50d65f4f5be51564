"""A browser, a server, and a page that plays, for the tests of a folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser.chromium import Browser, Page, chromium, serving


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as link:
        yield link


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page, playing; in the end it must not have complained."""
    opened = browser.page()
    opened.open(url)
    opened.until_phase("live")
    yield opened
    assert opened.errors == []
    opened.close()
