"""The observers export every call once, under its own name, and neither ids nor values."""

import asyncio
import json
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Final, NoReturn

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry, generate_latest
from redis.asyncio import Redis

from rss import Reference, SessionError, Sessions, SessionStore, StoreUnavailable
from rss.engine import operations
from rss.engine.coalesce import Operation
from rss.engine.engine import Engine
from rss.engine.operations import ALL
from rss.keys import Partitioned
from rss.observe import Observation
from rss.observe.logging import Logging
from rss.observe.opentelemetry import OpenTelemetry
from rss.observe.prometheus import Prometheus
from tests.documents import ROOT
from tests.keyspace import Keyspace
from tests.secrecy import Secrecy
from tests.servers import stopped
from tests.test_session import signed_in

DASHBOARD: Final = ROOT / "rss" / "guides" / "grafana.json"
GUIDE: Final = (ROOT / "rss" / "guides" / "observability.md").read_text()
VALUE: Final = "a-value-that-is-nobody's-business"


class Exports:
    """An observer that passes each observation to all observers of the package, and keeps what they export."""

    def __init__(self) -> None:
        self.seen: list[Observation] = []
        self._registry = CollectorRegistry()
        self._exporter, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = provider.get_tracer("test")
        telemetry = OpenTelemetry(provider, MeterProvider([self._reader], shutdown_on_exit=False))
        self._observers = self.seen.append, Prometheus(self._registry), telemetry, Logging("1ms")

    def __call__(self, observation: Observation) -> None:
        for observe in self._observers:
            observe(observation)

    @property
    def spans(self) -> list[ReadableSpan]:
        """The spans of calls that have ended."""
        return [span for span in self._exporter.get_finished_spans() if span.kind is SpanKind.CLIENT]

    @property
    def durations(self) -> list[HistogramDataPoint]:
        """The data points of the histogram of OpenTelemetry."""
        data = self._reader.get_metrics_data()
        assert data
        ((metric,),) = [scope.metrics for resource in data.resource_metrics for scope in resource.scope_metrics]
        assert (metric.name, metric.unit) == ("db.client.operation.duration", "s")
        return [point for point in metric.data.data_points if isinstance(point, HistogramDataPoint)]

    @property
    def prometheus(self) -> str:
        """The metrics as Prometheus reads them."""
        return generate_latest(self._registry).decode()

    def sample(self, name: str, **labels: str) -> float | None:
        """Return the value of a sample of Prometheus."""
        return self._registry.get_sample_value(name, labels)

    @property
    def text(self) -> str:
        """Everything that is exported, but not logged."""
        data = self._reader.get_metrics_data()
        assert data
        return "\n".join(
            [self.prometheus, data.to_json(), *(span.to_json() for span in self._exporter.get_finished_spans())]
        )


@pytest.fixture(name="exports")
def _exports() -> Exports:
    return Exports()


@pytest.fixture(name="store")
def _store(client: Redis, keyspace: Keyspace, exports: Exports) -> SessionStore:
    """A store that is observed, with an identity."""
    references = {"user_id": Reference(identity=True, limit=2, on_limit="refuse"), "ip": Reference()}
    options: dict[str, Any] = {"prefix": keyspace.prefix, "partitions": keyspace.partitions}
    return SessionStore(client, references=references, **options, observe=exports)


# ---------------------------------------------------------------------- every operation

#: Calls with the id of a session without an identity, and the operations that each of them runs.
#: The scripts that only the maintenance runs.
MAINTENANCE: Final = {"complete", "inspect", "inspect_ref", "inspect_fence"}

CALLS: Final[dict[str, tuple[Callable[[SessionStore, str], Awaitable[object]], list[str]]]] = {
    "get": (lambda s, i: s.get(i), ["get"]),
    "get that renews": (lambda s, i: s.get(i, touch=True), ["get_and_renew"]),
    "set": (lambda s, i: s.set(i, {"ip": "x"}), ["set_with_refs"]),
    "set that expects": (lambda s, i: s.set(i, {"n": 2}, expect={"n": 1}), ["set_with_refs"]),
    "create": (lambda s, _: s.create({"user_id": 1}), ["set_with_refs"]),
    "unset": (lambda s, i: s.unset(i, ["n"]), ["unset_with_refs"]),
    "pop": (lambda s, i: s.pop(i, ["n"]), ["unset_with_refs"]),
    "increment": (lambda s, i: s.increment(i, "n"), ["increment"]),
    "touch": (lambda s, i: s.touch(i), ["touch"]),
    "delete": (lambda s, i: s.delete(i), ["delete_with_refs"]),
    "rotate": (lambda s, i: s.rotate(i), ["rotate_with_refs"]),
    "login": (
        lambda s, i: s.rotate(i, {"user_id": 1}),
        ["get", "arrive_with_refs", "retire_with_refs", "confirm_with_refs"],
    ),
    "ids_by": (lambda s, _: s.ids_by("user_id", 1), ["find_by_ref", "hget"]),
    "count_by": (lambda s, _: s.count_by("user_id", 1, exact=False), ["hget", "scard"]),
    "delete_by": (lambda s, _: s.delete_by("user_id", 1), ["delete_by_ref", "hget"]),
    "blocked": (lambda s, _: s.blocked("user_id", 1), ["blocked"]),
    "unblock": (lambda s, _: s.unblock("user_id", 1), ["unblock"]),
}


def operation_of(attributes: Mapping[str, Any]) -> str:
    """Return the operation of a span or a point: a script, or a plain command."""
    name: str = attributes["db.operation.name"]
    return attributes["db.stored_procedure.name"] if name == "EVALSHA" else name.lower()


def test_every_operation_is_called() -> None:
    """The calls above run all scripts but those of maintenance. The table in the guide names all operations."""
    called = {one.script for one in ALL} | {"scard", "hget"}
    assert {name for _, names in CALLS.values() for name in names} == called - MAINTENANCE
    table = GUIDE.split("| operation | methods |", 1)[1].split("\n\n", 1)[0]
    assert set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))) == called | {
        "set",
        "hset",
        "hdel",
    }


@pytest.mark.parametrize(
    ("client", "keyspace"), [({}, 16), ("cluster", "cluster")], ids=["one server", "a cluster"], indirect=True
)
async def test_every_call_is_exported_once(
    store: SessionStore, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of the engine is in the spans, in both histograms and in the observations once, by its name."""
    runs, real = 0, Engine.run

    def run(*args: Any, **options: Any) -> Any:
        nonlocal runs
        runs += 1
        return real(*args, **options)

    monkeypatch.setattr(Engine, "run", run)
    layout = store.operations.layout
    away = next(n for n in range(layout.partitions) if n not in layout.with_value("user_id", 1))
    for call, names in CALLS.values():
        session_id = layout.mint(away)
        await store.set(session_id, {"n": 1})
        exports.seen.clear()
        await call(store, session_id)
        assert sorted(one.operation for one in exports.seen) == sorted(names)
        assert {one[2::2] for one in exports.seen} == {(1, None)}
    await store.aclose()

    expected = Counter([name for _, names in CALLS.values() for name in ("set_with_refs", *names)])
    assert runs == expected.total()
    spans = [dict(span.attributes or {}) for span in exports.spans]
    assert Counter(map(operation_of, spans)) == expected
    points = exports.durations
    assert {operation_of(point.attributes): point.count for point in points if point.attributes} == expected
    for name, number in expected.items():
        assert exports.sample("rss_operation_duration_seconds_count", operation=name, error="") == number
        assert exports.sample("rss_batch_size_count", operation=name) == number


# ---------------------------------------------------------------------- OpenTelemetry


def test_commands_and_scripts() -> None:
    """The span of a plain command has its name, and that of a script says EVALSHA, for all operations."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observe = OpenTelemetry(provider, MeterProvider())
    known = [one for one in vars(operations).values() if isinstance(one, Operation)]
    for one in known:
        observe(Observation(one.script or one.command.lower(), 0.1, 1, 1, None))
    names = [span.name for span in exporter.get_finished_spans()]
    assert names == [f"EVALSHA {one.script}" if one.script else one.command for one in known]
    assert {"EVALSHA get", "SCARD"} <= {*names}


async def test_a_span(store: SessionStore, exports: Exports) -> None:
    """A span has the attributes of the conventions, and covers the call. The histogram has its duration."""
    await store.load()
    await store.touch("a")
    await store.count_by("ip", "x", exact=False)
    await store.aclose()
    _, touched, *others = exports.spans
    (counted,) = [span for span in others if span.name == "SCARD"]
    assert touched.name == "EVALSHA touch"
    assert touched.attributes == {
        "db.system.name": "redis",
        "db.operation.name": "EVALSHA",
        "db.stored_procedure.name": "touch",
    }
    assert touched.status.status_code is StatusCode.UNSET
    assert counted.attributes == {"db.system.name": "redis", "db.operation.name": "SCARD"}
    point = exports.durations[1]
    assert point.attributes == touched.attributes
    assert touched.start_time
    assert touched.end_time
    assert point.sum == pytest.approx((touched.end_time - touched.start_time) / 1e9, abs=1e-8)
    assert point.explicit_bounds == (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)


async def test_the_parent_is_the_span_of_the_caller(store: SessionStore, exports: Exports) -> None:
    """Each of many calls in one batch is a child of the span that was current when it was called."""
    await store.load()

    async def request() -> None:
        with exports.tracer.start_as_current_span("request") as span:
            await store.touch("a")
            await asyncio.gather(store.get("a"), store.increment("a", "n"), return_exceptions=True)
            requests[span.get_span_context().span_id] = span

    requests = dict[int, Any]()
    before = len(exports.spans)
    await asyncio.gather(*(request() for _ in range(20)))
    await store.aclose()
    spans = exports.spans[before:]
    assert Counter(span.parent.span_id for span in spans if span.parent) == dict.fromkeys(requests, 3)
    assert len(requests) == 20
    assert max(one.batch for one in exports.seen) >= 10
    for span in spans:
        assert span.parent
        assert span.context
        parent = requests[span.parent.span_id]
        assert span.context.trace_id == parent.context.trace_id
        assert parent.start_time - 1e6 <= (span.start_time or 0) < (span.end_time or 0) <= parent.end_time
        size = (span.attributes or {}).get("db.operation.batch.size", 2)
        assert isinstance(size, int)
        assert size > 1


async def test_a_span_of_a_call_that_fails(store: SessionStore, exports: Exports) -> None:
    """An error is the type of the span and of the data point, and the text of the error is nowhere."""
    await store.load()
    with pytest.raises(SessionError):
        await store.increment("a", "n")
    await store.aclose()
    span, point = exports.spans[-1], exports.durations[-1]
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is None
    assert span.events == ()
    for attributes in (span.attributes, point.attributes):
        assert attributes
        assert attributes["error.type"] == "SessionNotFound"


async def test_a_span_tells_attempts(url: str) -> None:
    """A span tells how often the call was sent, unless that was once."""
    exports = Exports()
    async with Redis.from_url(url) as admin, SessionStore.from_url(url, observe=exports) as store:
        await store.touch("a")
        await admin.script_flush()
        await store.touch("a")
        async with asyncio.timeout(10), stopped(admin):
            call = asyncio.ensure_future(store.touch("a"))
            call.get_loop().call_soon(call.cancel)
            await asyncio.wait([call])
    attempts = [(span.attributes or {}).get("rss.attempts") for span in exports.spans[1:]]
    assert attempts == [None, 2, 0]
    assert exports.sample("rss_operation_retries_total", operation="touch") == 1


async def test_no_sdk_is_needed(client: Redis, keyspace: Keyspace) -> None:
    """Without an SDK, the observer of OpenTelemetry does nothing."""
    store = SessionStore(client, prefix=keyspace.prefix, observe=OpenTelemetry())
    assert await store.touch("a") is False
    await store.aclose()
    assert not trace.get_current_span().is_recording()


# ---------------------------------------------------------------------- Prometheus


async def test_metrics(store: SessionStore, exports: Exports) -> None:
    """Errors have a label, and the sizes of batches are counted."""
    await store.load()
    await asyncio.gather(*(store.touch("a") for _ in range(20)))
    with pytest.raises(SessionError):
        await store.increment("a", "n")
    await store.aclose()
    count = "rss_operation_duration_seconds_count"
    assert exports.sample(count, operation="touch", error="") == 20
    assert exports.sample(count, operation="increment", error="SessionNotFound") == 1
    assert exports.sample(count, operation="increment", error="") is None
    assert exports.sample("rss_batch_size_sum", operation="touch") == sum(one.batch for one in exports.seen[1:21])
    assert exports.sample("rss_operation_retries_total", operation="touch") is not None


async def test_calls_that_were_not_sent_have_no_batch(exports: Exports) -> None:
    """A call that was never sent counts in no batch."""
    store = SessionStore.from_url("unix:///nowhere/redis.sock", timeout=0.1, observe=exports)
    with pytest.raises(StoreUnavailable):
        await store.touch("a")
    await store.aclose()
    labels = {"operation": "touch", "error": "StoreUnavailable"}
    assert exports.sample("rss_operation_duration_seconds_count", **labels) == 1
    assert exports.sample("rss_batch_size_count", operation="touch") is None


def _labels(query: str) -> set[str]:
    """Return the labels that a query needs, without those that Prometheus adds."""
    grouped = " ".join(re.findall(r"by \((.*?)\)", query))
    return {*re.findall(r'(\w+)(?:=|!=|=~)"', query), *re.findall(r"\w+", grouped)} - {"job"}


async def test_the_dashboard_shows_metrics_that_exist(store: SessionStore, exports: Exports) -> None:
    """Each query of the dashboard and of the guide has names and labels that are exported. No metric is left out."""
    await store.touch("a")
    await store.aclose()
    labels: dict[str, set[str]] = {}
    for name, text in re.findall(r"^(rss_\w+)\{(.*)\}", exports.prometheus, re.MULTILINE):
        labels.setdefault(name, set()).update(re.findall(r'(\w+)="', text))
    metrics = set(re.findall(r"^# TYPE (rss_\w+) (?:histogram|counter)$", exports.prometheus, re.MULTILINE))
    assert metrics == set(re.findall(r"^\| `(rss_\w+)` \|", GUIDE, re.MULTILINE))

    dashboard, shown = json.loads(DASHBOARD.read_text()), set[str]()
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [one["definition"] for one in dashboard["templating"]["list"] if "definition" in one]
    queries += GUIDE.split("```promql\n", 1)[1].split("\n```", 1)[0].splitlines()
    for query in queries:
        names = re.findall(r"\brss_\w+", query)
        assert names
        assert all(_labels(query) <= labels[name] for name in names), query
        shown |= {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}
    assert shown == metrics


# ---------------------------------------------------------------------- logging


async def test_lines_in_the_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A call that is fast and succeeds is not logged. Other calls are, at a level that tells whether to look."""
    caplog.set_level(logging.DEBUG, "rss")
    async with Redis.from_url(url) as admin, SessionStore.from_url(url, timeout=0.3, observe=Logging("1s")) as store:
        await store.touch("a")
        assert caplog.messages == []
        with pytest.raises(SessionError):
            await store.increment("a", "n")
        async with stopped(admin):
            with pytest.raises(StoreUnavailable):
                await store.touch("a")
    (refused, broken) = caplog.records
    assert (refused.name, refused.levelname) == ("rss.observe", "INFO")
    assert re.fullmatch(
        r"operation=increment duration=0\.\d{6} batch=1 attempts=\d error=SessionNotFound", refused.message
    )
    assert broken.levelname == "WARNING"
    assert re.fullmatch(r"operation=touch duration=0\.\d{6} batch=1 attempts=1 error=StoreUnavailable", broken.message)


async def test_slow_calls_are_logged(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A call that takes as long as *slow* is logged as a warning, even if it succeeds."""
    async with Redis.from_url(url) as admin, SessionStore.from_url(url, observe=Logging(0.2)) as store:
        await store.touch("a")
        caplog.clear()
        async with stopped(admin):
            call = asyncio.ensure_future(store.touch("a"))
            await asyncio.sleep(0.3)
        await call
    (slow,) = caplog.records
    assert slow.levelname == "WARNING"
    assert re.fullmatch(r"operation=touch duration=0\.\d{6} batch=1 attempts=1 error=none", slow.message)


@pytest.mark.parametrize("slow", [0, "soon", None])
def test_a_bad_duration_is_refused(slow: Any) -> None:
    """*slow* must be a duration."""
    with pytest.raises(ValueError, match="slow must be"):
        Logging(slow)


# ---------------------------------------------------------------------- secrecy


async def test_no_id_and_no_value_is_exported(url: str) -> None:
    """No token, id or value is in a span, a metric or a log, however calls end, even if an observer raises."""
    secrecy, exports = Secrecy(), Exports()
    secrecy.others.add(VALUE)

    def observe(observation: Observation) -> NoReturn:
        exports(observation)
        raise ZeroDivisionError

    references = {"user_id": Reference(identity=True, limit=1, on_limit="refuse"), "ip": Reference()}
    options: dict[str, Any] = {"references": references, "partitions": 16, "timeout": 0.5, "observe": observe}
    asyncio.get_running_loop().set_exception_handler(None)
    with secrecy.learn(), secrecy.listen():
        async with Redis.from_url(url) as admin, SessionStore.from_url(url, prefix=VALUE, **options) as store:
            sessions, layout = Sessions(store), store.operations.layout
            assert isinstance(layout, Partitioned)
            session_id = ""
            await signed_in(sessions, {"user_id": VALUE, "name": VALUE})
            for call, _ in CALLS.values():
                secrecy.others.add(session_id := layout.mint(3))
                await store.set(session_id, {"n": 1, VALUE: VALUE, "ip": VALUE})
                with suppress(SessionError):
                    await call(store, session_id)
                await store.delete(session_id, reason="nobodys-business")
                with suppress(SessionError):
                    await call(store, session_id)
            with pytest.raises(SessionError):
                await store.create({"user_id": VALUE})
            async with stopped(admin):
                tasks = [asyncio.ensure_future(call(store, session_id)) for call, _ in CALLS.values()]
                await asyncio.sleep(0.05)
                for task in tasks[:5]:
                    task.cancel()
                await asyncio.wait(tasks)
    errors = {one.error.__name__ for one in exports.seen if one.error}
    assert errors >= {"StoreUnavailable", "SessionEnded", "LimitExceeded", "CancelledError"}
    assert any("the observer of a SessionStore failed" in line for line in secrecy.logged)
    assert any("StoreUnavailable" in line for line in secrecy.logged)
    secrecy.logged.append(exports.text)
    assert all(error in exports.text for error in errors)
    assert secrecy.leaks() == []
    assert "nobodys-business" not in exports.text
    secrecy.logged.append(exports.text.replace("EVALSHA touch", session_id))
    assert secrecy.leaks() == ["the log"]
