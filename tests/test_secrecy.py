"""The watch over secrets in the tests of the web layer notices a leak."""

import logging

import pytest
import redis

from rss import Session, Sessions, SessionStore
from tests.secrecy import Secrecy
from tests.test_session import signed_in


async def test_a_leak_is_seen(store: SessionStore, url: str) -> None:
    """A token in a command is noticed, and so are tokens, ids and CSRF secrets in the log."""
    secrecy = Secrecy()
    sessions = Sessions(store)
    with secrecy.learn(), secrecy.watch(url), secrecy.listen(), redis.Redis.from_url(url) as client:
        token = await signed_in(sessions)
        session = sessions.create_session(f"session-id={token}")
        await session.create_csrf_token()
        client.get("nothing")
        assert secrecy.tokens == {token}
        assert secrecy.leaks() == []
        logger = logging.getLogger("somebody's")
        for secret in (token, session.id, Session._csrf_secret(session), Session._csrf_secret(session).hex()):
            secrecy.logged.clear()
            logger.debug("%s", secret)
            assert secrecy.leaks() == ["the log"]
        secrecy.logged.clear()
        logger.debug("it failed", exc_info=ValueError(token))
        assert secrecy.leaks() == ["the log"]
        secrecy.logged.clear()
        client.get(f"x:{token}")
    assert secrecy.leaks() == ["a command"]
    assert not logging.getLogger().isEnabledFor(logging.DEBUG)
    with pytest.raises(AssertionError):
        assert secrecy.leaks() == []
