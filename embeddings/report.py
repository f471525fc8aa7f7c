"""The loop's report as one self-contained HTML page: inline SVG, no script, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

GRADE_NAMES = {0: "irrelevant", 1: "partial", 2: "exact"}
GRADE_COLOURS = {0: "#b3403a", 1: "#c99a2e", 2: "#2f7d4f"}
WIDTH, HEIGHT, MARGIN = 340, 260, 34
NUM_BINS = 80

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2126;background:#fff;max-width:1120px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:2rem 0 .6rem}
p{max-width:70ch}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.4rem 0;display:block;overflow-x:auto}
th,td{padding:.3rem .8rem;text-align:right;border-bottom:1px solid #e3e6ea}
th{font-weight:600;color:#505a66}td:first-child,th:first-child,.text{text-align:left}
small{color:#68727e}.plots{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}figcaption{font-weight:600}
"""


@dataclass(frozen=True)
class Sheet:
    """A table of the page: text cells, the first column to the left."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def render(title: str, subtitle: str, plots: Sequence[str], plots_note: str, sheets: Sequence[Sheet]) -> str:
    """The whole page."""
    body = [f"<h1>{escape(title)}</h1><small>{escape(subtitle)}</small>"]
    if plots:
        drawn = f"<p>{escape(plots_note)}</p><div class='plots'>{''.join(plots)}</div>"
        body.append(f"<h2>Scores by grade</h2>{drawn}")
    body += [_sheet(sheet) for sheet in sheets]
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width,initial-scale=1'><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>"
    )


def violin(caption: str, scores_by_grade: Mapping[int, NDArray[np.float64]]) -> str:
    """Density of cosines per grade as mirrored curves, with mean and quartiles; one figure per model.

    Args:
        scores_by_grade: grade -> cosines in [-1, 1] of the judged pairs of that grade.
    """
    everything = np.concatenate([scores for scores in scores_by_grade.values() if len(scores)] or [np.zeros(1)])
    low, high = min(0.0, float(everything.min())), max(1.0, float(everything.max()))
    inner_width, inner_height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    parts = [_axis(low, high, inner_height)]
    for place, grade in enumerate(sorted(scores_by_grade)):
        scores = scores_by_grade[grade]
        centre = MARGIN + inner_width * (place + 0.5) / len(scores_by_grade)
        parts.append(_shape(scores, grade, centre, inner_width / len(scores_by_grade) * 0.45, (low, high)))
        label = f"{grade} {GRADE_NAMES[grade]}"
        parts.append(f"<text x='{centre:.1f}' y='{HEIGHT - 12}' text-anchor='middle'>{label}</text>")
        parts.append(
            f"<text x='{centre:.1f}' y='{HEIGHT - 1}' text-anchor='middle' fill='#68727e'>n={len(scores):,}</text>"
        )
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption><svg width='{WIDTH}' height='{HEIGHT}' font-size='11' "
        f"role='img' aria-label='{escape(caption)}: cosine by grade'>{''.join(parts)}</svg></figure>"
    )


def reliability_plot(caption: str, points: Sequence[tuple[float, float, int]]) -> str:
    """Share that was right over mean certainty, one point per bin; a calibrated labeller lies on the diagonal.

    Args:
        points: (mean probability of the most probable grade, share right, pairs) of each bin.
    """
    inner_width, inner_height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def place(x: float, y: float) -> tuple[str, str]:
        return f"{MARGIN + inner_width * x:.1f}", f"{MARGIN + inner_height * (1 - y):.1f}"

    places = [place(sure, right) for sure, right, _ in points]
    dots = "".join(
        f"<circle cx='{x}' cy='{y}' r='4' fill='{GRADE_COLOURS[2]}'>"
        f"<title>{pairs:,} pairs: sure {sure:.2f}, right {right:.2f}</title></circle>"
        for (x, y), (sure, right, pairs) in zip(places, points, strict=True)
    )
    line, diagonal = (" ".join(map(",".join, corners)) for corners in (places, (place(0, 0), place(1, 1))))
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption><svg width='{WIDTH}' height='{HEIGHT}' font-size='11' "
        f"role='img' aria-label='{escape(caption)}: share right by certainty'>{_axis(0.0, 1.0, inner_height)}"
        f"<polyline points='{diagonal}' stroke='#b9c0c8' stroke-dasharray='4'/>"
        f"<polyline points='{line}' fill='none' stroke='{GRADE_COLOURS[2]}'/>{dots}"
        f"<text x='{WIDTH / 2:.0f}' y='{HEIGHT - 8}' text-anchor='middle'>certainty</text></svg></figure>"
    )


def _axis(low: float, high: float, inner_height: float) -> str:
    lines = []
    for tick in np.arange(np.ceil(low * 4) / 4, high + 1e-9, 0.25):
        y = MARGIN + inner_height * (1 - (tick - low) / (high - low))
        lines.append(f"<line x1='{MARGIN}' x2='{WIDTH - 6}' y1='{y:.1f}' y2='{y:.1f}' stroke='#e3e6ea'/>")
        lines.append(f"<text x='{MARGIN - 4}' y='{y + 4:.1f}' text-anchor='end' fill='#68727e'>{tick:.2f}</text>")
    return "".join(lines)


def _shape(
    scores: NDArray[np.float64], grade: int, centre: float, half_width: float, limits: tuple[float, float]
) -> str:
    if not len(scores):
        return ""
    low, high = limits

    def height(value: float) -> float:
        return MARGIN + (HEIGHT - 2 * MARGIN) * (1 - (value - low) / (high - low))

    counts, edges = np.histogram(scores, bins=NUM_BINS, range=limits)
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)
    density = np.convolve(counts, kernel / kernel.sum(), mode="same")
    reach = density / density.max() * half_width
    kept = np.flatnonzero(reach > half_width * 0.01)
    middles = ((edges[:-1] + edges[1:]) / 2)[kept]
    right = [f"{centre + r:.1f},{height(m):.1f}" for r, m in zip(reach[kept], middles, strict=True)]
    left = [f"{centre - r:.1f},{height(m):.1f}" for r, m in zip(reach[kept], middles, strict=True)]
    q1, q3, mean = float(np.quantile(scores, 0.25)), float(np.quantile(scores, 0.75)), float(scores.mean())
    colour, outline = GRADE_COLOURS[grade], " ".join([*right, *reversed(left)])
    return (
        f"<polygon points='{outline}' fill='{colour}' fill-opacity='.35' stroke='{colour}'/>"
        f"<line x1='{centre:.1f}' x2='{centre:.1f}' y1='{height(q1):.1f}' y2='{height(q3):.1f}' stroke='{colour}' "
        f"stroke-width='4'/><circle cx='{centre:.1f}' cy='{height(mean):.1f}' r='4' fill='#fff' stroke='{colour}' "
        f"stroke-width='2'/><text x='{centre + 8:.1f}' y='{height(mean) + 4:.1f}'>{mean:.2f}</text>"
    )


def _sheet(sheet: Sheet) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in sheet.header)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in sheet.rows)
    note = f"<p>{escape(sheet.note)}</p>" if sheet.note else ""
    return f"<h2>{escape(sheet.title)}</h2>{note}<table><tr>{head}</tr>{rows}</table>"
