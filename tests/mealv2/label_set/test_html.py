"""A label set in a notebook: its facts, one label, and no markup from names."""

from pathlib import Path

import label_sets
from mealv2.label_set import Encoding, LabelSet


def test_a_set_shows_what_it_is_and_names_are_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    classes = [f"{hostile} {n}" for n in range(9)]
    keys = [f"{hostile}\n'\".jpg", "2.jpg"]
    made = label_sets.make_set(
        tmp_path / "set", Encoding(9, topk=3), keys, num_views=4, classes=classes
    )
    shown = LabelSet.open(tmp_path / "set")._repr_html_()
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4  # three classes and the key
    for fact in ("<bdi>2</bdi>", "<bdi>4</bdi>", "resnet50.a1_in1k", "top-3"):
        assert fact in shown
    best = made.dense_NVC[0, 0].argmax()
    assert f"{hostile} {best}".replace("<", "&lt;").replace(">", "&gt;") in shown
    assert f"{100 * made.dense_NVC[0, 0].max():.1f} %" in shown
