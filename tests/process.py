"""A process of an application; `test_incomplete.py` starts several: `python -m tests.process URL PREFIX REFERENCES`.

It works on its own sessions until stdin is closed, and prints the live ones and how often it met each error, as JSON.
"""

import asyncio
import json
import os
import random
import sys
from collections import Counter
from typing import Any

from rss import IncompleteReference, SessionStore


async def work(store: SessionStore, names: list[str], live: dict[str, dict[str, Any]], errors: Counter[str]) -> None:
    """Do one of the things that applications do."""
    values = {"user_id": random.randrange(50), "ip": f"x{random.randrange(20)}"}
    session_id = random.choice([*live, ""])
    try:
        if not session_id or len(live) < 5:
            live[await store.create(values)] = values
        elif (step := random.randrange(5)) == 0:
            await store.set(session_id, values)
            live[session_id] = values
        elif step == 1:
            live[await store.rotate(session_id)] = live.pop(session_id)
        elif step == 2:
            assert await store.delete(session_id)
            del live[session_id]
        elif step == 3:
            assert await store.get(session_id) == {"id": session_id, **live[session_id]}
        else:
            name = random.choice(names)
            assert session_id in await store.ids_by(name, live[session_id][name])
    except IncompleteReference:
        errors["IncompleteReference"] += 1


async def main() -> None:
    """Work until stdin is closed."""
    url, prefix, names = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
    live, errors = dict[str, dict[str, Any]](), Counter[str]()
    stop = asyncio.get_running_loop().run_in_executor(None, os.read, 0, 1)
    async with SessionStore.from_url(url, references=names, prefix=prefix, timeout=30) as store:
        print("begun", flush=True)
        while not stop.done():
            await work(store, names, live, errors)
            await asyncio.sleep(0.001)  # Other tests run beside this one.
    print(json.dumps([live, errors]))


if __name__ == "__main__":
    asyncio.run(main())
