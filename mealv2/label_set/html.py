"""How a label set looks in a notebook."""

import html
from collections.abc import Mapping
from typing import Any

import numpy as np

from mealv2.label_set.encoding import Encoding

_NUM_CLASSES = 5


def label_set_html(
    manifest: Mapping[str, Any],
    split: str,
    num_images: int,
    num_views: int,
    key: str | None,
    label: tuple[np.ndarray, np.ndarray] | None,
) -> str:
    """Return a table of what a set is and a list of the classes of one view, as HTML.

    ``label`` is what ``LabelSet.lookup`` returns for the first view of ``key``. All text of the
    data set is escaped, and isolated from the direction of the text around it.
    """
    plan = manifest["plan"]
    views = plan["roles"][split].get("views", {})
    num_bytes = sum(
        int(shard.get("bytes", 0))
        for block in manifest["roles"][split]["blocks"]
        for shard in block["shards"]
    )
    facts = {
        "split": split,
        "images": f"{num_images:,}",
        "views per image": f"{num_views:,}",
        "views": f"{views.get('name', 'unknown')}, seed {views.get('seed', 'none')}",
        "classes": f"{len(plan['classes']):,}",
        "teachers": ", ".join(str(t["model"]) for t in plan.get("teachers", [])) or "unknown",
        "encoding": str(Encoding.of_plan(dict(plan))),
        "image size": f"{plan['img_size']} pixels",
        "files": f"{num_bytes / 1e6:,.2f} MB",
    }
    rows = "".join(
        f'<tr><th style="text-align: left">{_text(name)}</th>'
        f'<td style="text-align: left">{_text(value)}</td></tr>'
        for name, value in facts.items()
    )
    table = f"<table><caption>LabelSet</caption><tbody>{rows}</tbody></table>"
    if key is None or label is None:
        return table
    return table + _view(plan["classes"], key, label)


def _view(classes: list[str], key: str, label: tuple[np.ndarray, np.ndarray]) -> str:
    """Return the likeliest classes of the first view of an image, with bars."""
    ids_K, probs_K = label[0][0], label[1][0]
    order = np.argsort(-probs_K, kind="stable")[:_NUM_CLASSES]
    rows = "".join(
        f'<tr><td style="text-align: left">{_text(classes[int(ids_K[at])])}</td>'
        f"<td>{100 * float(probs_K[at]):.1f} %</td>"
        f'<td style="min-width: 8em"><div style="height: .6em; background: #0072b2; '
        f'width: {100 * float(probs_K[at]):.1f}%"></div></td></tr>'
        for at in order
        if ids_K[at] >= 0
    )
    caption = f"<caption>the first view of {_text(key)}</caption>"
    return f"<table>{caption}<tbody>{rows}</tbody></table>"


def _text(text: str) -> str:
    return f"<bdi>{html.escape(text)}</bdi>"
