"""Write the tables of docs/benchmarks/speed.md from results of `mealv2 bench`.

    mealv2 bench --results-file speed.json
    python benchmarks/speed.py speed.json > docs/benchmarks/speed.md

With several files, for example of several machines, the sections follow one another.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_INTRODUCTION = """\
# Speed, each figure a ratio within one run

`python benchmarks/speed.py FILE…` writes this page from the results of `mealv2 bench`
(`--results-file FILE`); [bench](../how-to/bench.md) explains the lines. The sides of a line take
turns; the figure is the median over the rounds, with minimum and maximum in brackets.
"""


def document(reports: Sequence[dict[str, Any]]) -> str:
    """Return the document for reports of --results-file, one per machine."""
    return "\n".join([_INTRODUCTION, *(line for report in reports for line in _section(report))])


def _section(report: dict[str, Any]) -> Iterator[str]:
    hardware = report["hardware"]
    yield f"## {hardware.get('gpu') or hardware['cpu']}, {hardware['cores']} cores\n"
    yield f"```\n{report['command']}\n```\n"
    yield _about(report)
    if report["lines"]:
        yield from _table(
            ["line", "what", "against", "figure", "goal", ""],
            [_row(line) for line in report["lines"]],
        )
    yield from _not_measured(report["lines"])
    for stage, found in report.get("profile", {}).items():
        yield from _profile(stage.replace("_", " "), found)
    yield from _estimate(report.get("estimate", {}))
    yield from _rounds(report["lines"])


def _about(report: dict[str, Any]) -> str:
    hardware = report["hardware"]
    parts = [f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gb']:.0f} GB"]
    if "gpu" in hardware:
        parts.append(f"{hardware['gpu']}, {hardware['gpu_memory_gb']:.0f} GB")
    parts += [f"networks in {report['precision']}", f"{report['seconds']:.0f} s in all"]
    for kind in ("images", "drawn_images"):
        if not (images := report.get(kind)):
            continue
        drawn = "drawn " if kind == "drawn_images" else ""
        parts.append(
            f"{images['num_images']} {drawn}JPEGs of {images['mean_bytes'] / 1000:.0f} kB and "
            f"{images['mean_pixels'] / 1000:.0f} thousand pixels on average"
        )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['date']}; {'; '.join(parts)}; {versions}.\n"


def _row(line: dict[str, Any]) -> list[str]:
    figure, unit = "-", line["unit"]
    if "figure" in line:
        unit = unit if unit == "x" else f" {unit}"
        figure = f"{line['figure']:.3g}{unit} [{line['least']:.3g} to {line['most']:.3g}]"
    verdict = line["verdict"].partition(":")[0]
    return [_title(line), line["what"], line["against"], figure, line["goal"], verdict]


def _title(line: dict[str, Any]) -> str:
    return f"{line['line']}, {line['pictures']}" if "pictures" in line else str(line["line"])


def _not_measured(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    missing = [line for line in lines if "figure" not in line]
    for line in missing:
        yield f"- `{_title(line)}` was {line['verdict']}."
    if missing:
        yield ""


def _profile(stage: str, found: dict[str, Any]) -> Iterator[str]:
    yield f"### Where the time of {stage} goes, batches of {found['batch_size']}\n"
    for part in ("step", "reading"):
        cells = [
            [name, f"{1e3 * of['seconds']:.2f}", f"{of['percent']:.1f}"]
            for name, of in found[part].items()
        ]
        title = "a step" if part == "step" else "reading the batch, one thread"
        yield from _table([title, "ms", "%"], cells)
    yield ", ".join(f"{value} {what}" for what, value in found["arithmetic"].items()) + ".\n"


def _estimate(estimate: dict[str, Any]) -> Iterator[str]:
    if rows := estimate.get("recipes"):
        yield f"### ImageNet's {estimate['images']:,} images, hours of one such GPU\n"
        yield from _table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
    elif estimate:
        yield ", ".join(f"{name} {value}" for name, value in estimate.items()) + " (a view).\n"


def _rounds(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    measured = [line for line in lines if line.get("turns")]
    if not measured:
        return
    yield "### Every repetition\n"
    for line in measured:
        figures = ", ".join(f"{figure:.4g}" for figure in line["figures"])
        yield f"- `{_title(line)}`: {figures}"
        for name, turns in line["turns"].items():
            rates = ", ".join(f"{t['units']} in {t['seconds']:.4g}" for t in turns)
            yield f"  - {name}, units in seconds: {rates}"
        notes = ", ".join(f"{name} {value}" for name, value in line.get("notes", {}).items())
        if notes:
            yield f"  - {notes}"
    yield ""


def _table(head: list[str], rows: Sequence[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="+", type=Path, help="file of mealv2 bench --results-file")
    reports: list[dict[str, Any]] = [
        json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().file
    ]
    print(document(reports), end="")


if __name__ == "__main__":
    main()
