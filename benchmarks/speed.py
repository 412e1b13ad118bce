"""Write docs/benchmarks/speed.md's tables from what `mealv2 bench --results-file FILE` kept.

    mealv2 bench --results-file speed.json
    python benchmarks/speed.py speed.json > docs/benchmarks/speed.md

Several files, as of several machines, follow one another.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.bench.document import document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="+", type=Path, help="what mealv2 bench --results-file wrote")
    reports: list[dict[str, Any]] = [
        json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().file
    ]
    print(document(reports), end="")


if __name__ == "__main__":
    main()
