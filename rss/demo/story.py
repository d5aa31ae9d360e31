"""Why this library exists, in a minute: `python -m rss.demo.story` plays it on a real server."""

import asyncio
import sys
from typing import TypedDict

from redis.asyncio import Redis

from rss import SessionEnded, SessionStore
from rss.testing import redis_server

PREFIX = "rss-demo"


class Login(TypedDict, total=False):
    """What the sessions of this story hold."""

    id: str
    user: str
    device: str
    cart: list[str]


def say(text: str) -> None:
    """Print a step of the story."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")


async def keys(client: Redis) -> list[str]:
    """Return the names of the keys that are in Redis."""
    return [str(key) async for key in client.scan_iter(match=f"{PREFIX}:*")]


async def show(client: Redis) -> None:
    """Print every key in Redis, and what it holds."""
    for key in sorted(await keys(client), key=lambda key: (not key.startswith(f"{PREFIX}:{{"), key)):
        ttl = await client.ttl(key)
        days, left = divmod(ttl, 86_400)
        lives = "for ever" if ttl < 0 else f"{days + (left > 0)} days" if days else f"{-(-left // 60)} minutes"
        if await client.type(key) == "set":
            held = "set   " + ", ".join(f"{str(member)[:6]}..." for member in sorted(await client.smembers(key)))
        else:
            fields = await client.hgetall(key)
            held = "hash  " + ", ".join(f"{k!s}={v!s}" for k, v in fields.items() if k not in ("id", "_created"))
        short = f"{key[: len(PREFIX) + 8]}...}}" if key.startswith(f"{PREFIX}:{{") else key
        print(f"    {short:<24} {lives:>10}   {held}")


async def play(store: SessionStore[Login], client: Redis) -> None:
    """Tell the story, step by step."""
    say("Alice signs in on her phone, her laptop and a computer in a hotel; Bob on his phone.")
    phone = await store.create({"user": "alice", "device": "phone"})
    laptop = await store.create({"user": "alice", "device": "laptop"})
    hotel = await store.create({"user": "alice", "device": "hotel computer"})
    bob = await store.create({"user": "bob", "device": "phone"})
    await show(client)

    say('Where is Alice signed in?    async for session in store.find_by("user", "alice")')
    devices = [session.get("device", "") async for session in store.find_by("user", "alice", ["device"])]
    print("    " + ", ".join(sorted(devices)))

    say('She signs out everywhere but on her laptop.    await store.delete_by("user", "alice", keep=[laptop])')
    print(f"    {await store.delete_by('user', 'alice', keep=[laptop], reason='signed-out')} sessions ended")
    await show(client)

    say("A late request of the hotel computer writes to its session.    await store.set(hotel, ...)")
    try:
        await store.set(hotel, {"cart": ["towel"]})
    except SessionEnded as refused:
        print(f"    refused: {refused}")
    else:
        raise AssertionError("a session that had ended came back")  # pragma: no cover - only a faulty store gets here

    say("She signs in on her phone again, and gets a new id as she proves who she is.    await store.rotate(...)")
    anonymous = await store.create({"cart": ["book"]})
    phone = await store.rotate(anonymous, {"user": "alice", "device": "phone"})
    print(f"    her cart came along: {(await store.get(phone)).get('cart')}")

    say('She resets her password: every session of hers ends, now.    await store.delete_by("user", "alice")')
    print(f"    {await store.delete_by('user', 'alice', reason='password-reset')} sessions ended")
    print(f"    left: {await store.count_by('user', 'alice')} of Alice, {await store.count_by('user', 'bob')} of Bob")
    print(f"    and the laptop can be told why: {await store.ended(laptop)}")
    await show(client)

    say("Bob was not disturbed.    await store.get(bob)")
    print(f"    {(await store.get(bob, ['device'])).get('device')}")


async def main() -> None:
    """Play on a server that is there, or on one of our own."""
    with redis_server() as server:
        print(f"Redis: {server.origin}")
        async with (
            SessionStore[Login].from_url(server.url, references=["user"], prefix=PREFIX) as store,
            Redis.from_url(server.url, decode_responses=True) as client,
        ):
            try:
                await play(store, client)
            finally:
                await client.unlink(*await keys(client))


if __name__ == "__main__":
    asyncio.run(main())
