"""The operator's command `rss`. It needs the extra `[cli]`."""

import io
import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run the command, and exit with its code. *args*: its arguments. None: those of `sys.argv`."""
    try:
        # These define the commands. Without the extra, one sentence says what is missing.
        from rss.cli import sessions, upkeep, watching  # noqa: F401, PLC0415
        from rss.cli.command import cli  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.stderr.write(f"rss needs {error.name}: pip install 'redis-session-sets[cli]'\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # A terminal may lack a character of a value.
            stream.reconfigure(errors="backslashreplace")
    cli(args, prog_name="rss")
