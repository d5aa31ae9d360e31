"""Fixtures of the tests of frameworks: sessions, and a site that is served."""

from collections.abc import AsyncIterator

import aiohttp
import pytest

from rss import Sessions, SessionStore
from tests.integrations.serving import browser
from tests.integrations.sites import SITES, Site


@pytest.fixture(autouse=True)
def _kept(kept_secret: None) -> None:
    """Watches every test of a framework for secrets in the log and in commands."""


@pytest.fixture(name="sessions")
def _sessions(store: SessionStore) -> Sessions:
    """Sessions with the default options."""
    return Sessions(store)


@pytest.fixture(name="site", params=SITES, ids=str)
def _site(request: pytest.FixtureRequest) -> Site:
    """Each framework, on each server."""
    site: Site = request.param
    return site


@pytest.fixture(name="served")
async def _served(site: Site, sessions: Sessions) -> AsyncIterator[str]:
    """The URL of the site."""
    async with site.serve(site.build(sessions)) as url:
        yield url


@pytest.fixture(name="visitor")
async def _visitor(served: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the site that keeps cookies."""
    async with browser(served) as client:
        yield client
