"""The demo plays through, and leaves nothing behind."""

import os
import subprocess
import sys

from redis.asyncio import Redis

from rss.demo.story import PREFIX


async def test_the_story_is_told(redis_url: str) -> None:
    """The story ends without an error, prints its main steps, and leaves no key."""
    told = subprocess.run(  # noqa: ASYNC221 - nothing else runs
        [sys.executable, "-m", "rss.demo.story"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "REDIS_URL": redis_url, "RSS_SERVER": "url"},
    ).stdout
    assert "hotel computer, laptop, phone" in told
    assert "refused: the session was ended: signed-out" in told
    assert "left: 0 of Alice, 1 of Bob" in told
    assert "and the laptop can be told why: password-reset" in told
    async with Redis.from_url(redis_url) as client:
        assert [key async for key in client.scan_iter(match=f"{PREFIX}:*")] == []
