"""The report as one file: no scripts, no links, every picture inside. All text of data and models is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from datamodules.vlir.pictures import Drawn, colour, data_url
from datamodules.vlir.statistics import Corpus, Entry, by_source, crops_of, mean, reasons

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2328; max-width: 1180px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 24px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 32px 0 8px; }
.muted { color: #656d76; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.tile { border: 1px solid #d0d7de; border-radius: 6px; padding: 8px 14px; min-width: 110px; }
.tile b { display: block; font-size: 22px; font-weight: 600; }
table { border-collapse: collapse; }
th, td { text-align: right; padding: 4px 14px 4px 0; border-bottom: 1px solid #eaeef2; }
th { font-weight: 600; }
th:first-child, td:first-child, td.bar { text-align: left; }
td.bar div { background: #cf222e; height: 12px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(350px, 1fr)); gap: 16px 24px; }
.chart h3 { font-size: 14px; margin: 8px 0 0; font-weight: 600; }
svg text { font: 11px system-ui, sans-serif; fill: #656d76; }
.sample { border-top: 1px solid #d0d7de; padding: 16px 0; display: grid; gap: 20px; }
.sample { grid-template-columns: 560px 1fr; }
.sample img, .sample svg { max-width: 100%; display: block; }
.crops { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 8px; }
.crops img { border: 3px solid; max-height: 160px; }
.question { font-weight: 600; margin: 0 0 8px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0 0; }
.look { color: white; border-radius: 4px; padding: 0 6px; font-size: 13px; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; padding: 8px; margin: 4px 0 12px; }
@media (max-width: 900px) { .sample { grid-template-columns: 1fr; } }
"""


def document(
    title: str, corpus: Corpus, samples: Sequence[tuple[Entry, Drawn]], refused: Sequence[dict[str, Any]]
) -> str:
    """The whole page.

    Args:
        title: what it is about.
        corpus: all of it, for the numbers.
        samples: those that are shown.
        refused: rows of ``rejected.jsonl`` that are shown.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        _tiles(corpus),
        "<h2>By source</h2>",
        _sources(corpus),
        "<h2>Samples</h2>",
        _charts(corpus.entries),
    ]
    if corpus.rejected:
        parts += ["<h2>Why rows and drafts were rejected</h2>", bars(reasons(corpus))]
    if corpus.manifest.get("cost"):
        parts += ["<h2>Cost, over all runs</h2>", _cost(corpus.manifest["cost"])]
    if samples:
        parts += [f"<h2>{len(samples)} of {len(corpus.entries)} samples</h2>"]
        parts += [_sample(entry, drawn) for entry, drawn in samples]
    if refused:
        parts += ["<h2>Examples of what was rejected</h2>", *map(_refused, refused)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def histogram(title: str, values: Sequence[float], whole: bool = False, unit: str = "") -> str:
    """A chart of how often values occur.

    Args:
        title: above it.
        values: finite numbers.
        whole: whether they are whole numbers, each a bar of its own if there are not too many.
        unit: behind the numbers of the axis.
    """
    if not values:
        return ""
    low, high = min(values), max(values)
    if whole and high - low < 12:
        labels = [f"{k}{unit}" for k in range(int(low), int(high) + 1)]
        bins = [int(value) - int(low) for value in values]
    else:
        step = _step((high - low) / 10)
        first = math.floor(low / step)
        bins = [math.floor(value / step) - first for value in values]
        labels = [f"{(first + k) * step:g}{unit}" for k in range(max(bins) + 2)]  # of the edges
    counts = [bins.count(k) for k in range(max(bins) + 1)]
    width, height, bottom = 340.0, 120.0, 18.0
    across, most = width / len(counts), max(counts)
    thick = min(across - 2, 48.0) if whole else across - 2
    drawn = []
    for k, n in enumerate(counts):
        tall = n / most * (height - 14)
        drawn.append(
            f'<rect x="{(k + 0.5) * across - thick / 2:.1f}" y="{height - tall:.1f}" '
            f'width="{thick:.1f}" height="{tall:.1f}" '
            f'fill="#0969da"/>'
        )
        if n:
            at = k * across + across / 2
            drawn.append(f'<text x="{at:.1f}" y="{height - tall - 3:.1f}" text-anchor="middle">{n}</text>')
    middle = 0.5 if len(labels) == len(counts) else 0.0  # labels of bars, or of the edges between them
    for k in range(0, len(labels), max(1, math.ceil(len(labels) / 7))):
        at, anchor = (k + middle) * across, "middle" if middle or k else "start"
        anchor = "end" if at > width - 4 else anchor
        drawn.append(f'<text x="{at:.1f}" y="{height + 14:.1f}" text-anchor="{anchor}">{labels[k]}</text>')
    svg = f'<svg width="{width:.0f}" height="{height + bottom:.0f}" role="img">{"".join(drawn)}</svg>'
    about = f"mean {mean(values):.3g}{unit}, median {sorted(values)[len(values) // 2]:.3g}{unit}"
    return f'<div class="chart"><h3>{escape(title)}</h3>{svg}<div class="muted">{about}</div></div>'


def bars(counts: Mapping[str, int]) -> str:
    """Names with a bar each."""
    most = max(counts.values())
    rows = [
        f"<tr><td>{escape(name)}</td><td>{n}</td>"
        f'<td class="bar"><div style="width:{max(2, round(n / most * 420))}px"></div></td></tr>'
        for name, n in counts.items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _step(rough: float) -> float:
    """A round number of about this size: 1, 2 or 5 times a power of ten."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next((k * power for k in (1, 2, 5) if k * power >= rough * 0.999), 10 * power)


def _tiles(corpus: Corpus) -> str:
    entries, manifest = corpus.entries, corpus.manifest
    images = len({image for entry in entries for image in entry.images})
    tiles = [("samples", str(len(entries))), ("images", str(images))]
    if entries:
        tiles.append(("crops per sample", f"{mean([len(entry.regions) for entry in entries]):.2f}"))
    if manifest:
        asked = manifest["questions"]
        tiles.append((f"of {asked} questions kept", f"{manifest['kept'] / asked:.0%}" if asked else "-"))
        cost = manifest["cost"].values()
        least = "at least " if any(each["uncounted"] for each in cost) else ""
        tiles.append(("cost", f"{least}{sum(each['cost'] for each in cost):.2f}"))
        tiles.append(("teacher", escape(manifest["teacher"])))
    shown = "".join(f'<div class="tile"><b>{value}</b><span class="muted">{name}</span></div>' for name, value in tiles)
    return f'<div class="tiles">{shown}</div>'


def _sources(corpus: Corpus) -> str:
    found = by_source(corpus)
    columns = [*dict.fromkeys(entry.split for entry in corpus.entries), *(["rejected"] if corpus.rejected else [])]
    return _table(
        ["source", *columns], [[source, *(counts.get(c, 0) for c in columns)] for source, counts in found.items()]
    )


def _charts(entries: Sequence[Entry]) -> str:
    crops = crops_of(entries)
    charts = [
        histogram("Crops per sample", [len(entry.regions) for entry in entries], whole=True),
        histogram("Crop area, share of the image", [100 * crop.share for crop in crops], unit="%"),
        histogram("Crop width, pixels", [crop.width for crop in crops]),
        histogram("Crop height, pixels", [crop.height for crop in crops]),
        histogram("Words per rationale", [entry.words for entry in entries], whole=True),
        histogram("Image area, megapixels", [h * w / 1e6 for entry in entries for h, w in entry.sizes]),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _cost(cost: Mapping[str, Mapping[str, Any]]) -> str:
    names = ("model", "replies", "input_tokens", "output_tokens", "uncounted")
    rows = [[role, *(each[name] for name in names), f"{each['cost']:.2f}"] for role, each in cost.items()]
    head = ["", "model", "replies", "tokens in", "tokens out", "replies without a count", "cost"]
    return _table(head, rows)


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(_cell(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _sample(entry: Entry, drawn: Drawn) -> str:
    sample = entry.sample
    images = "".join(_image(entry, k, drawn) for k in range(len(drawn.images)))
    crops = "".join(
        f'<img src="{data_url(crop)}" style="border-color:{colour(k)}" alt="crop {k + 1}">'
        for k, crop in enumerate(drawn.crops)
    )
    words, k = [], 0
    for step in sample.rationale:
        words.append(escape(step.text))
        if step.region is not None:
            box = ", ".join(f"{c:.0f}" for c in step.region.box)
            words.append(f'<span class="look" style="background:{colour(k)}">look {k + 1}: {box}</span>\n')
            k += 1
    options = f"<div>Options: {escape('; '.join(sample.choices))}</div>" if sample.choices else ""
    right = escape(" | ".join(dict.fromkeys(sample.answers)))
    return (
        f'<div class="sample"><div>{images}<div class="crops">{crops}</div></div><div>'
        f'<p class="question">{escape(sample.question)}</p>{options}<div class="muted">right: {right}; '
        f"{escape(sample.source)} {escape(sample.id)}, {escape(entry.split)}</div>"
        f'<p class="text">{"".join(words)}</p></div></div>'
    )


def _image(entry: Entry, number: int, drawn: Drawn) -> str:
    """An image with its boxes over it, which stay sharp at any size."""
    height, width = entry.sizes[number]
    image = drawn.images[number]
    line = max(width, height) / 190
    boxes = []
    for k, region in enumerate(entry.regions):
        if region.image == number:
            x1, y1, x2, y2 = region.box
            boxes.append(
                f'<rect x="{x1}" y="{y1}" width="{x2 - x1:.2f}" height="{y2 - y1:.2f}" fill="none" '
                f'stroke="{colour(k)}" stroke-width="{line:.1f}"/>'
            )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{image.width}" height="{image.height}" role="img">'
        f'<image href="{data_url(image)}" width="{width}" height="{height}"/>{"".join(boxes)}</svg>'
    )


def _refused(row: dict[str, Any]) -> str:
    text = f"<pre>{escape(row['text'])}</pre>" if row.get("text") else ""
    head = f"<b>{escape(row['reason'])}</b> {escape(row['source'])} {escape(row['id'])}: {escape(row['detail'])}"
    return f"<div>{head}</div>{text}"
