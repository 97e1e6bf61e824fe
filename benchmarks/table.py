"""Markdown tables from benchmark results, for the README and the documentation.

    python -m benchmarks.table benchmarks/results/cpu/*.json

One table per file and shape. For a CPU only ratios are printed: absolute times of a processor
shared with others say little elsewhere. Rivals that did not run are listed below, with the reason.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SIZES = ("N", "H", "V", "rows", "steps", "K", "B")
ABSOLUTE = (
    "tokens/s",
    "ms",
    "us",
    "q1 ms",
    "q3 ms",
    "q1 us",
    "q3 us",
    "TFLOP/s",
    "GFLOP/s",
    "GB/s",
)
LEFT_OUT = ("rounds", "minimal MB", "MB", "of", "GB")


def by_shape(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows by their sizes, as "N = 512, H = 768"."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        known = [(name, row[name]) for name in SIZES if name in row]
        sizes = [f"{name} = {x:,}" if isinstance(x, int) else f"{name}: {x}" for name, x in known]
        found.setdefault(", ".join(sizes), []).append(row)
    return found


def machine_line(data: dict[str, Any]) -> str:
    """The machine, the versions and the date in one line."""
    facts = data["machine"]
    units = "1 GPU" if facts["device"] == "cuda" else f"{facts['threads']} thread(s)"
    here = {k: v for k, v in facts["versions"].items() if v != "absent" and k != "fastalign"}
    versions = ", ".join(f"{name} {version}" for name, version in here.items())
    dtype = data["notes"].get("dtype", "")
    return f"{facts['name']}, {units}, {dtype}; {versions}; {facts['date'][:10]}"


def markdown(data: dict[str, Any], name: str) -> str:
    """The tables of one result file."""
    hidden = set(SIZES) | set(LEFT_OUT)
    if data["machine"]["device"] == "cpu":
        hidden |= set(ABSOLUTE)
    lines = [f"### {name}", "", machine_line(data) + "."]
    for shape, rows in by_shape(data["rows"]).items():
        columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c not in hidden]
        right = [any(isinstance(row.get(column), float) for row in rows) for column in columns]
        lines += ["", f"**{shape}**", "", line(columns)]
        lines.append(line(["---:" if numeric else "---" for numeric in right]))
        for row in rows:
            own = row.get("of") == "fastalign"
            texts = [rounded(column, row.get(column)) for column in columns]
            lines.append(line([f"**{t}**" if own and t else t for t in texts]))
    for kind, verb in (("absent", "Not measured"), ("failed", "Failed")):
        found = data["notes"].get(kind) or {}
        if found:
            lines += ["", f"{verb}: " + "; ".join(f"{k} ({v})" for k, v in found.items()) + "."]
    return "\n".join(lines) + "\n"


def line(texts: list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def rounded(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if "error" in column:
        return f"{value:.0e}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def main() -> None:
    for name in sys.argv[1:]:
        print(markdown(json.loads(Path(name).read_text()), Path(name).stem))


if __name__ == "__main__":
    main()
