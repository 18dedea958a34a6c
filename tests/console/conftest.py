"""A browser, and the console in it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.conftest import once, service
from tests.console.browser import Console, launch, opened


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = launch(playwright)
        yield running
        running.close()


@pytest.fixture(scope="session")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models folder that ``tests.console.unusual`` makes."""
    from tests.console import unusual

    return once(tmp_path_factory, "unusual", unusual.make) / "models"


@pytest.fixture(scope="session")
def unusual_url(unusual: Path) -> Iterator[str]:
    with service(unusual) as client:
        yield str(client.base_url)


@pytest.fixture
def url(client: httpx.Client) -> str:
    return str(client.base_url)


@pytest.fixture
def console(browser: Browser, url: str) -> Iterator[Console]:
    """The console of a service with all models, in which no error may occur."""
    with opened(browser, url) as console:
        console.choose("digits")
        yield console
        assert console.errors == []
