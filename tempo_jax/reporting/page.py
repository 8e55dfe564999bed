"""A plan as HTML: the sentence, a drawing of the step to scale, a row for each layer, the text.

One page or one cell of a notebook, without scripts and without anything loaded from elsewhere.
Untrusted and pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from tempo_jax.reporting.costs import Layer, Visit
from tempo_jax.reporting.figures import Figures
from tempo_jax.reporting.text import COLUMNS, as_text, cells, duration, sentence, totals

# Of the drawing, in its own units; a page shows it as wide as there is room.
_WIDTH, _LEFT, _RIGHT = 1000, 90, 990
_ENCLAVE, _THICK = 34, 44  # top and height of the enclave's lane
_CROSSING, _CROSSING_HEIGHT = 96, 84
_DEVICES, _DEVICES_HEIGHT = 204, 120
_LEAST = 2.0  # width of a visit, however short

_STYLE = """
.tempo-plan { --ink: #1b1f24; --soft: #667085; --line: #d8dde4; --paper: #fff;
  --inside: #3b6fb6; --blinding: #e0912f; --devices: #3f9a6a;
  color: var(--ink); background: var(--paper); font: 14px/1.45 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { .tempo-plan { --ink: #e6e9ee; --soft: #98a2b3;
  --line: #3a4250; --paper: #15181d; --inside: #6c9be0; --blinding: #eba950; --devices: #5dbb88; } }
.tempo-plan h1 { font-size: 1.05em; font-weight: 600; margin: 0 0 .4em; }
.tempo-plan p { margin: .15em 0; }
.tempo-plan svg { display: block; width: 100%; height: auto; margin: .8em 0; }
.tempo-plan svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.tempo-plan svg text.soft { fill: var(--soft); font-size: 11px; }
.tempo-plan svg text.on { fill: var(--paper); font-size: 11px; pointer-events: none; }
.tempo-plan .inside { fill: var(--inside); } .tempo-plan .blinding { fill: var(--blinding); }
.tempo-plan .devices { fill: var(--devices); stroke: var(--paper); stroke-width: .6; }
.tempo-plan .lane { fill: none; stroke: var(--line); }
.tempo-plan .wide { overflow-x: auto; }
.tempo-plan table { border-collapse: collapse; width: 100%; color: var(--ink); }
.tempo-plan th, .tempo-plan td { padding: .25em .7em; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
.tempo-plan th:first-child, .tempo-plan td:first-child { text-align: left; white-space: normal;
  overflow-wrap: anywhere; }
.tempo-plan th { color: var(--soft); font-weight: 500; }
.tempo-plan td small { color: var(--soft); display: block; }
.tempo-plan td svg { width: 120px; height: 10px; margin: 0; }
.tempo-plan pre { overflow-x: auto; font-size: 12px; }
"""


def page(figures: Figures) -> str:
    """A whole page that needs nothing beside itself."""
    title = escape(f"{figures.name}: what runs where")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>body {{ margin: 0; }}\n"
        ".tempo-plan { padding: 1.5em; max-width: 1100px; margin: auto; min-height: 100vh; "
        "box-sizing: border-box; }</style>\n"
        f"</head>\n<body>\n{fragment(figures)}\n</body>\n</html>\n"
    )


def fragment(figures: Figures) -> str:
    """The report for a place in another page, such as a notebook."""
    facts = "".join(f"<p>{escape(line.strip())}</p>" for line in totals(figures))
    return (
        f'<style>{_STYLE}</style>\n<div class="tempo-plan">\n<h1>{escape(sentence(figures))}</h1>\n'
        f"{facts}\n{drawing(figures)}\n{_table(figures)}\n"
        f"<details><summary>In full</summary><pre>{escape(as_text(figures))}</pre></details>\n"
        "</div>"
    )


def drawing(figures: Figures) -> str:
    """The step as SVG: the enclave's visits in time, what crosses after each, and the products.

    Widths are the enclave's seconds, heights of what crosses bytes, and of products arithmetic.
    """
    visits = figures.costs.visits
    seconds = sum(v.inside_seconds + v.blinding_seconds for v in visits)
    most_bytes = max((max(v.bytes_up, v.bytes_down) for v in visits), default=0)
    most_work = max((sum(work for _, work in v.products) for v in visits), default=0)
    shapes = [
        _text(0, _ENCLAVE + 18, "enclave"),
        _text(0, _ENCLAVE + 33, duration(seconds), "soft"),
        _text(0, _CROSSING + 36, "crossing"),
        _text(0, _CROSSING + 51, f"≤ {most_bytes / 1e6:.1f} MB", "soft"),
        _text(0, _DEVICES + 18, "devices"),
        _text(0, _DEVICES + 33, f"≤ {most_work / 1e9:.2g} GFLOP", "soft"),
        *_legend(),
        *(
            f'<rect class="lane" x="{_LEFT}" y="{top}" width="{_RIGHT - _LEFT}" height="{height}"/>'
            for top, height in (
                (_ENCLAVE, _THICK),
                (_CROSSING, _CROSSING_HEIGHT),
                (_DEVICES, _DEVICES_HEIGHT),
            )
        ),
    ]
    for visit, start, width in _placed(visits, seconds):
        shapes += _visit(visit, start, width, seconds, most_bytes, most_work)
    height = _DEVICES + _DEVICES_HEIGHT + 24
    note = "Widths are the enclave's seconds; heights are bytes that cross, and arithmetic."
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="what runs where">'
        + "".join(shapes)
        + _text(_LEFT, height - 6, note, "soft")
        + "</svg>"
    )


def _placed(visits: tuple[Visit, ...], seconds: float) -> Iterator[tuple[Visit, float, float]]:
    """Each visit with its place and width in the drawing."""
    room = _RIGHT - _LEFT - _LEAST * len(visits)
    start = float(_LEFT)
    for visit in visits:
        share = (visit.inside_seconds + visit.blinding_seconds) / seconds if seconds else 0.0
        width = _LEAST + max(room, 0.0) * share
        yield visit, start, width
        start += width


def _visit(
    visit: Visit, start: float, width: float, seconds: float, most_bytes: int, most_work: int
) -> list[str]:
    own = visit.inside_seconds + visit.blinding_seconds
    inside = width * visit.inside_seconds / own if own else width
    middle = _CROSSING + _CROSSING_HEIGHT / 2
    room = _CROSSING_HEIGHT / 2 - 2
    down, up = (
        n / most_bytes * room if most_bytes else 0.0 for n in (visit.bytes_down, visit.bytes_up)
    )
    shapes = [
        _box(
            "inside", start, _ENCLAVE, inside, _THICK, f"computes {duration(visit.inside_seconds)}"
        ),
        _box(
            "blinding",
            start + inside,
            _ENCLAVE,
            width - inside,
            _THICK,
            f"blinds and unblinds {duration(visit.blinding_seconds)}",
        ),
        _box(
            "blinding",
            start,
            middle,
            width,
            down,
            f"{visit.bytes_down / 1e6:.2f} MB to the devices",
        ),
        _box("devices", start, middle - up, width, up, f"{visit.bytes_up / 1e6:.2f} MB came back"),
    ]
    top = float(_DEVICES)
    for name, work in visit.products:
        height = work / most_work * (_DEVICES_HEIGHT - 2) if most_work else 0.0
        shapes.append(_box("devices", start, top, width, height, f"{name}: {work / 1e9:.3g} GFLOP"))
        if width > 7 * len(name) and height > 13:
            shapes.append(_text(start + 4, top + 12, name, "on"))
        top += height
    return shapes


def _legend() -> Iterator[str]:
    """What the colours mean, above the drawing."""
    entries = (
        ("inside", "computes in the clear"),
        ("blinding", "blinds; goes down"),
        ("devices", "on blinded values; comes back"),
    )
    for n, (kind, words) in enumerate(entries):
        yield _box(kind, _LEFT + 230 * n, 6, 14, 14, words)
        yield _text(_LEFT + 230 * n + 20, 17, words)


def _box(kind: str, x: float, y: float, width: float, height: float, title: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _text(x: float, y: float, words: str, kind: str = "name") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _table(figures: Figures) -> str:
    total = figures.offloaded_work[1]
    largest = max((layer.work for layer in figures.costs.layers), default=0)
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = []
    for layer in figures.costs.layers:
        name, *rest = (escape(cell) for cell in cells(layer, total))
        why = "".join(f"<small>stays inside: {escape(reason)}</small>" for reason in layer.reasons)
        numbers = "".join(f"<td>{cell}</td>" for cell in rest)
        rows.append(f"<tr><td>{name}{why}</td>{numbers}<td>{_bar(layer, largest)}</td></tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}<th>arithmetic to scale</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _bar(layer: Layer, largest: int) -> str:
    if not (layer.work and largest):
        return ""
    outside, whole = (120 * n / largest for n in (layer.work_outside, layer.work))
    return (
        '<svg viewBox="0 0 120 10">'
        + _box("devices", 0, 0, outside, 10, "on the devices")
        + _box("inside", outside, 0, whole - outside, 10, "in the enclave")
        + "</svg>"
    )
