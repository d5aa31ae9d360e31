"""The table of a deployment, and what must not be in it."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from benchmarks.chaos.scene import Phase

#: Seconds in which a deployment must have recovered.
RECOVERY: Final = 5.0
_COLUMNS: Final = (
    "fault", "operations", "errors", "lost", "duplicated", "revived", "unreachable", "wrong",
    "recovered, s", "p99, ms", "longest, s",
)  # fmt: skip


def merged(phases: Iterable[Phase]) -> list[Phase]:
    """Return one phase for each name, which holds the counts of all rounds."""
    found: dict[str, Phase] = {}
    for phase in phases:
        if phase.name in found:
            found[phase.name].add(phase)
        else:
            found[phase.name] = phase
    return [*found.values()]


def show(title: str, phases: list[Phase]) -> None:
    """Print a table with a row for each phase."""
    plain = any("operations" in phase.plain for phase in phases)
    columns = [*_COLUMNS, *(["redis-py: operations, errors, lost, wrong"] if plain else [])]
    print(f"\n### {title}\n")
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
    for phase in phases:
        print(f"| {' | '.join(_cells(phase, plain=plain))} |")
    print(f"\n{sum(len(phase.times) for phase in phases):,} operations", flush=True)


def _cells(phase: Phase, *, plain: bool) -> Iterator[str]:
    yield phase.name
    if phase.skipped:
        yield f"left out: {phase.skipped}"
        return
    yield f"{len(phase.times):,}"
    cancelled = Counter(cancelled=phase.plain["cancelled"]) if phase.plain["cancelled"] else Counter[str]()
    yield _listed(phase.errors + phase.foreign + cancelled)
    for count in (phase.lost, phase.duplicated, phase.revived, phase.unreachable):
        yield f"{count}"
    yield _listed(phase.wrong + Counter({"texts with an id or a value": phase.leaks}))
    times = sorted(phase.times)
    yield "not" if phase.recovered is None else f"{phase.recovered:.1f}" if phase.seconds else ""
    yield f"{times[int(len(times) * 0.99)] * 1000:,.0f}" if times else ""
    yield f"{times[-1]:.1f}" if times else ""
    if plain:
        yield ", ".join(f"{phase.plain[name]:,}" for name in ("operations", "errors", "lost", "wrong"))


def failures(phase: Phase, *, times: bool) -> Iterator[str]:
    """Yield what must not be. *times*: judge how long the recovery took, too."""
    for what, counts in (
        ("unexpected errors", phase.unexpected),
        ("errors of other libraries", phase.foreign),
        ("lost without an excuse", phase.inexcusable),
        ("wrong", phase.wrong),
    ):
        if counts:
            yield f"{what}: {_listed(counts)}"
    for what, count in (
        ("duplicated", phase.duplicated),
        ("revived", phase.revived),
        ("unreachable", phase.unreachable),
        ("ids or values in errors or the log", phase.leaks),
    ):
        if count:
            yield f"{what}: {count}"
    if times and (phase.recovered is None or phase.recovered > RECOVERY):
        yield f"not recovered in {RECOVERY:.0f} s"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items() if n) or "0"
