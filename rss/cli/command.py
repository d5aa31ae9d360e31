"""Define a command: its options, help, confirmation, errors and exit codes. All commands share these."""

import asyncio
import contextlib
import functools
import importlib.metadata
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import click
import redis.exceptions

from rss.cli.opening import Refusal, Store, opened
from rss.cli.output import Output
from rss.clients import Client
from rss.engine.failures import failure_of
from rss.engine.meta import Held
from rss.errors import IncompleteReference, PartlyDone, SessionError, SessionNotFound

_CODES: Final = """\b
Exit codes:
  0    done, and nothing is wrong
  1    there is no such session, nothing to revoke, or something is wrong
  2    wrong usage, or no store has used the prefix
  3    Redis did not answer, or refused
  4    done, but a reference is incomplete, so sessions may be missing: see rss reindex
  130  Ctrl-C
"""


class _Group(click.Group):
    """The command, which turns errors into one sentence and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command of the group."""
        try:
            return super().invoke(ctx)
        except IncompleteReference as error:
            _stop(ctx, f"the reference {error.field!r} is incomplete, so sessions may be missing: see rss reindex", 4)
        except PartlyDone as error:
            _stop(ctx, f"{error}: run it again", 3)
        except SessionNotFound as error:
            _stop(ctx, str(error), 1)
        except SessionError as error:
            _stop(ctx, str(error), 3)
        except (TimeoutError, redis.exceptions.RedisError) as error:
            _stop(ctx, str(failure_of(error)), 3)
        except ValueError as error:  # The library refuses an argument.
            _stop(ctx, str(error), 2)
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(130)


def _stop(ctx: click.Context, sentence: str, code: int) -> NoReturn:
    click.echo(f"Error: {sentence}", err=True)
    ctx.exit(code)


@click.group(
    cls=_Group,
    context_settings={"max_content_width": 100},
    epilog=f"""\b
Example:
  export REDIS_URL=redis://localhost:6379
  rss ls user_id=7
  rss revoke user_id=7 --reason password-reset
  rss doctor

\b
Completion of commands and options in bash; zsh_source and fish_source are for other shells:
  eval "$(_RSS_COMPLETE=bash_source rss)"

{_CODES}""",
)
@click.version_option(importlib.metadata.version("redis-session-sets"), prog_name="rss")
def cli() -> None:
    """Look at the web sessions of redis-session-sets in Redis, end them, and look after their keys.

    The Redis is that of --url or REDIS_URL, and the sessions are those of --prefix or RSS_PREFIX. The references are
    read from Redis, so the command needs no configuration of the application. It may run while applications use the
    sessions.

    It shows session ids. These are not the tokens in cookies: nobody can use a session by its id.
    """


@dataclass
class Place:
    """The store and the output of a command. *yes*: do not ask for confirmation. *held*: what its meta key says."""

    store: Store
    client: Client
    held: Held
    url: str
    prefix: str
    output: Output
    yes: bool


_URL: Final = click.option(
    "--url",
    envvar="REDIS_URL",
    default="redis://localhost:6379",
    show_default=True,
    help="The Redis: redis://, rediss:// for TLS, unix://, redis+cluster:// for a Redis Cluster, or "
    "redis+sentinel://host:port,host:port/service. Also REDIS_URL.",
)
_PREFIX: Final = click.option(
    "--prefix", envvar="RSS_PREFIX", default="rss", show_default=True, help="The prefix of the keys. Also RSS_PREFIX."
)
_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON: a document, or a line for each item.")
_YES: Final = click.option("--yes", is_flag=True, help="Do not ask. Without a terminal, this is required.")

_Function = Callable[..., Coroutine[Any, Any, int]]


def command(name: str, *examples: str, asks: bool = False, events: bool = True) -> Callable[[_Function], click.Command]:
    """Make a command of a function that takes a `Place` and options, and returns the exit code.

    *asks*: whether it asks before it does its work. *events*: whether to publish events if the applications do.
    """
    lines = "".join(f"  {example}\n" for example in examples)

    def decorate(function: _Function) -> click.Command:
        @functools.wraps(function)
        def run(url: str, prefix: str, *, as_json: bool, yes: bool = False, **options: Any) -> None:
            async def work() -> int:
                async with opened(url, prefix, options.get("forget", ()), events=events) as (store, client, held):
                    output = Output(as_json=as_json)
                    return await function(Place(store, client, held, url, prefix, output, yes), **options)

            click.get_current_context().exit(asyncio.run(work()))

        decorated: Callable[..., None] = run
        for option in ([_YES] if asks else []) + [_JSON, _PREFIX, _URL]:
            decorated = option(decorated)
        # An id may begin with a dash, so there are no options of one letter, and what is no option is an argument.
        settings = {"ignore_unknown_options": True}
        return cli.command(name, epilog=f"\b\nExample:\n{lines}\n{_CODES}", context_settings=settings)(decorated)

    return decorate


def ask(place: Place, question: str) -> None:
    """Ask for confirmation, unless --yes was given. Stop if the answer is no. Refuse if nobody can answer."""
    if place.yes:
        return
    if not sys.stdin.isatty():
        raise Refusal("there is no terminal to ask for confirmation: use --yes")
    # The handler of asyncio would only cancel the task, which cannot end until there is an answer.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if not click.confirm(question, err=True):
            place.output.note("Nothing was changed.")
            click.get_current_context().exit(1)
    except click.Abort:  # Ctrl-C or Ctrl-D, after the question.
        with contextlib.suppress(OSError):  # The terminal may be gone.
            place.output.note("\nNothing was changed.")
        raise
    finally:
        signal.signal(signal.SIGINT, handler)
