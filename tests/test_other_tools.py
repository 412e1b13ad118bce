"""The page that compares mealv2 with other tools: its flags exist, and its claims hold."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import cli
import mealv2

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "other-tools.md"
HEADER = "| | timm | Ultralytics | fastai | HF Trainer | Lightning | mealv2 |"


def rows(text: str) -> dict[str, list[str]]:
    """Return the six cells of each row of the comparison, by the row's name."""
    found: dict[str, list[str]] = {}
    for table in text.split(HEADER)[1:]:
        for line in table.strip().partition("\n\n")[0].splitlines()[1:]:
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            assert name not in found, f"two rows: {name}"
            found[name] = cells
    return found


def offers(cell: str) -> bool:
    """Tell whether a cell names something that needs no code of the user."""
    return bool(cell) and not cell.startswith(("–", "own code"))


def flags_of(command: click.Command) -> set[str]:
    return {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}


def commands(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", found) for inner, found in commands(command))


ROWS = rows(PAGE.read_text(encoding="utf-8"))


def test_every_row_has_six_cells_that_are_not_empty() -> None:
    assert len(ROWS) >= 130
    assert [name for name, cells in ROWS.items() if len(cells) != 6 or not all(cells)] == []


def test_every_flag_command_and_name_of_mealv2_exists() -> None:
    known = dict(commands(cli.cli))
    of_any = set().union(*map(flags_of, known.values()))
    text = PAGE.read_text(encoding="utf-8")
    ours = " ".join(cells[-1] for cells in ROWS.values()) + text.partition("offers less")[2]
    for span in re.findall(r"`([^`]+)`", ours):
        words = [word for word in span.removeprefix("mealv2 ").split() if not word.startswith("-")]
        flags = [word for word in span.split() if word.startswith("--")]
        if span.startswith("mealv2 ") or (words and words[0] in known):
            name = " ".join(words[: 2 if " ".join(words[:2]) in known else 1])
            assert name in known, span
            assert set(flags) <= flags_of(known[name]), span
        elif span.startswith("mealv2."):
            assert span.removeprefix("mealv2.") in mealv2.__all__, span
        else:
            assert set(flags) <= of_any, span


def test_no_row_is_left_where_all_five_have_it_and_mealv2_does_not() -> None:
    without_lightning = {name: (cells[:4], cells[-1]) for name, cells in ROWS.items()}
    missing = [
        name
        for name, (others, own) in without_lightning.items()
        if all(map(offers, others)) and not offers(own)
    ]
    assert missing == []


def test_the_page_names_every_row_in_which_mealv2_has_less_than_most() -> None:
    below = PAGE.read_text(encoding="utf-8").partition("## Where mealv2 offers less")[2]
    less = {
        n for n, (*others, own) in ROWS.items() if not offers(own) and sum(map(offers, others)) >= 3
    }
    assert less <= set(re.findall(r"\*\*(.+?)\*\*", below)) <= ROWS.keys()


@pytest.mark.parametrize("cell", ["–", "– detection only", "own code", "own code: `f`", ""])
def test_a_cell_without_a_name_offers_nothing(cell: str) -> None:
    assert not offers(cell)
    assert offers("`--lr`")
    assert offers("always")
