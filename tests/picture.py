"""Draws the picture of the README: `python -m tests.picture` writes rss/guides/keys.svg."""

from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

FILE: Final = Path(__file__).parents[1] / "rss" / "guides" / "keys.svg"

_STYLE: Final = """
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1f2328 }
.title { font-weight: bold }
.word { font-family: system-ui, sans-serif; fill: #59636e }
rect { fill: #f6f8fa; stroke: #d1d9e0; rx: 6px }
.script { fill: #ddf4ff; stroke: #54aeff }
path { fill: none; stroke: #54aeff; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .word { fill: #9198a1 } rect { fill: #151b23; stroke: #3d444d }
  .script { fill: #121d2f; stroke: #388bfd } path { stroke: #388bfd }
}
"""


def _box(x: int, y: int, width: int, lines: list[str], kind: str = "") -> str:
    """Return a box with a title and some lines."""
    height = 20 * len(lines) + 14
    kinds = ["title", *[""] * len(lines)]
    texts = "".join(
        f'<text class="{one}" x="{x + 12}" y="{y + 22 + 20 * n}" xml:space="preserve">{escape(line)}</text>'
        for n, (line, one) in enumerate(zip(lines, kinds, strict=False))
    )
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}"/>{texts}'


def _word(x: int, y: int, text: str) -> str:
    return f'<text class="word" x="{x}" y="{y}">{escape(text)}</text>'


def _line(x: int, y: int, to_x: int, to_y: int) -> str:
    middle = (x + to_x) // 2
    return f'<path d="M{x} {y} C{middle} {y} {middle} {to_y} {to_x} {to_y}"/>'


def draw() -> str:
    """Return the picture."""
    parts = [
        _word(20, 26, "one call, one script"),
        _box(20, 40, 250, ["await store.set(", '  "a",', '  {"user_id": 7,', '   "ip": "::1"})'], "script"),
        _word(400, 26, "the session: a hash"),
        _box(400, 40, 330, ["rss:{a}", "id       a", "user_id  7", "ip       ::1"]),
        _word(400, 182, "its reference sets"),
        _box(400, 196, 330, ["rss:user_id:{7}", "a  b  c"]),
        _box(400, 262, 330, ["rss:ip:{::1}", "a"]),
        *(_line(270, 87, 400, y) for y in (87, 223, 289)),
        _word(20, 200, "Hash, sets and TTLs change"),
        _word(20, 220, "together, or not at all."),
        _word(20, 260, 'delete_by("user_id", 7) ends a, b and c.'),
    ]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 750 330" width="750" height="330" role="img">'
    title = "<title>A session is a hash; reference sets hold its id; one script changes all of them</title>"
    return f"{head}{title}<style>{_STYLE}</style>{''.join(parts)}</svg>\n"


if __name__ == "__main__":
    FILE.write_text(draw())
