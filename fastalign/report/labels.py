"""Words at points of a figure that do not cover one another: the first free place around each."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes

CHARACTER, LINE = 5.6, 12.0  # of a label, in points: a little more than a character takes
AROUND = ((1, 0), (1, -1), (1, 1), (0, -1), (0, 1), (-1, 0), (-1, -1), (-1, 1))
DISTANCES = (6.0, 14.0, 24.0, 36.0)


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    colour: str
    bold: bool = True


def write(axis: Axes, labels: list[Label], taken: list[tuple[float, float]]) -> None:
    """Writes the labels; the axis must have its final limits and size.

    Args:
        taken: points, in the axis' units, that no label may cover.
    """
    scale = 72.0 / axis.figure.dpi
    frame = [edge * scale for edge in axis.get_window_extent().extents]
    points = [axis.transData.transform(point) * scale for point in taken]
    boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    written: list[tuple[float, float, float, float]] = []
    for label in labels:
        x, y = axis.transData.transform((label.x, label.y)) * scale
        lines = label.text.split("\n")
        width, height = CHARACTER * max(map(len, lines)), LINE * len(lines)
        tries = []
        for distance in DISTANCES:
            for right, up in AROUND:
                left = x + right * distance - (width if right < 0 else width / 2 * (right == 0))
                bottom = y + up * distance - (height if up < 0 else height / 2 * (up == 0))
                box = (left, bottom, left + width, bottom + height)
                # Near is better: a label may cover a little of a line before it goes far.
                cost = _cost(box, boxes + 4 * written, frame) + 2 * (distance - DISTANCES[0])
                tries.append((cost, box, right, up, distance))
        _, box, right, up, distance = min(tries, key=lambda tried: tried[0])
        written.append(box)
        axis.annotate(
            label.text,
            (label.x, label.y),
            (right * distance, up * distance),
            textcoords="offset points",
            color=label.colour,
            fontweight="bold" if label.bold else "normal",
            ha={1: "left", 0: "center", -1: "right"}[right],
            va={1: "bottom", 0: "center", -1: "top"}[up],
            multialignment="left",
            # From afar a thin line says whose label it is.
            arrowprops={
                "arrowstyle": "-",
                "color": label.colour,
                "lw": 0.6 if distance > DISTANCES[1] else 0.0,
            },
        )


def _cost(
    box: tuple[float, float, float, float],
    others: list[tuple[float, float, float, float]],
    frame: list[float],
) -> float:
    """Area of others that the box covers, and of itself outside of the frame."""
    covered = sum(_common(box, other) for other in others)
    area = (box[2] - box[0]) * (box[3] - box[1])
    inside = _common(box, (frame[0], frame[1], frame[2], frame[3]))
    return round(covered + 4 * (area - inside), 3)


def _common(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, wide) * max(0.0, high)
