"""Names from data on a terminal and in spreadsheets: shown, never run."""

import ast
import csv
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cli
from conftest import Result
from mealv2.text import printable, shortened
from pipeline import console
from pipeline.load_model import spreadsheet_cell

ROOT = Path(cli.__file__).parent
CONTROL = [*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x202E, 0x2066, 0x2028, 0xD800]
EVIL = "=cmd|'\x1b[2J\x1b]0;owned\x07\u202etxt"


@pytest.mark.parametrize("code", CONTROL)
def test_no_control_character_is_printed(code: int) -> None:
    text = printable(f"a{chr(code)}b")
    assert text.isascii()
    assert text.isprintable()
    assert f"{code:x}" in text


def test_text_of_any_language_stays(capsys: pytest.CaptureFixture[str]) -> None:
    text = "Füchse\t狐\n\N{FOX FACE} \\x1b"
    assert printable(text) == text
    assert printable("a\nb\tc", is_line=True) == r"a\nb\tc"
    console.info(f"{text}\x1b[1m")
    assert capsys.readouterr().err == f"{text}\\x1b[1m\n"


def test_cells_of_tables_and_lists_of_names_are_one_line() -> None:
    assert len(console.table([["a\nb", "c"], ["\x1b[m", "\r"]]).splitlines()) == 3
    assert console.first_names(["a\nb", "\x07"]) == r"a\nb, \x07"


def test_a_very_long_message_keeps_its_begin_and_end() -> None:
    text = f"--img-size {'9' * 9999} is no size"
    assert len(shortened(text)) <= 2001
    assert shortened(text).startswith("--img-size 9")
    assert shortened(text).endswith("9 is no size")
    assert shortened(text[:2000]) == text[:2000]


def test_everything_is_printed_at_one_place() -> None:
    """console.info, and cli for errors, reports and scripts."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("mealv2/**/*.py"), ROOT / "cli.py"]
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and re.fullmatch(
            r"print|(click|typer)\.s?echo|tqdm\.write|sys\.std(out|err)\.write|warnings\.warn",
            ast.unparse(node.func),
        )
    }
    assert found == {"cli.py", "pipeline/console.py"}


@pytest.mark.parametrize(
    "first", ["=", "+", "-", "@", "\t", "\r", "\n", "\N{FULLWIDTH EQUALS SIGN}"]
)
def test_a_cell_that_begins_like_a_formula_is_text(first: str) -> None:
    assert spreadsheet_cell(f"{first}1") == f"'{first}1"


@pytest.mark.parametrize("value", [-1, -0.5, "a=1", "", "1-2"])
def test_other_cells_stay(value: object) -> None:
    assert spreadsheet_cell(value) == value


@pytest.fixture
def evil_data(data_dir: Path, tmp_path: Path) -> Path:
    """The data with a class, and with an image, that have evil names."""
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    for split in ("train", "val"):
        first = min((folder / split).iterdir())
        image = min(first.iterdir())
        image.rename(image.with_name(f"-1\x1b[31m{image.name}"))
        first.rename(first.with_name(EVIL))
    return folder


def test_evil_names_of_classes_and_images_reach_neither_terminal_nor_spreadsheet(
    evil_data: Path,
    finetune_flags: list[str],
    tmp_path: Path,
    run_cli: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at = finetune_flags.index("--data-dir") + 1
    run = tmp_path / "run"
    flags = [*finetune_flags[:at], evil_data, *finetune_flags[at + 1 :]]
    monkeypatch.chdir(evil_data)
    broken = evil_data / "val" / EVIL / "broken\x1b[5m.jpg"
    results = [run_cli(*flags, "--output", run)]
    use = ["--checkpoint", run / "student", "--results-file"]
    for name in ("a.csv", "a.json"):
        results += [
            run_cli("evaluate", "--data-dir", evil_data, *use, tmp_path / f"evaluate-{name}"),
            run_cli("predict", f"val/{EVIL}", *use, tmp_path / f"predict-{name}"),
        ]
    assert [result.code for result in results] == [0] * 5, results
    broken.write_bytes(b"no image")
    skipping = run_cli("predict", broken.parent, *use[:2], "--on-bad-image", "skip", "--json")
    failing = run_cli("predict", broken, *use[:2])

    assert skipping.report["skipped"].keys() == {str(broken)}  # JSON has the true name
    assert (skipping.code, failing.code) == (0, 1)
    for result in [*results, skipping, failing]:
        for text in (result.stdout, result.stderr):
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert r"\x1b[2J" in results[1].stdout  # a class
    assert r"\x1b[2J" in results[2].stdout
    assert r"broken\x1b[5m.jpg" in failing.stderr
    for command in ("evaluate", "predict"):
        with (tmp_path / f"{command}-a.csv").open(newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert f"'{EVIL}" in cells
        assert not [cell for cell in cells if cell[:1] in "=+-@\t\r" and cell]
        exact = json.loads((tmp_path / f"{command}-a.json").read_text("utf-8"))
        rows = exact.get("per_class") or exact["predictions"][0]["best"]
        assert EVIL in {row["class"] for row in rows}


def test_a_batch_script_is_exact_in_a_file_and_escaped_on_a_terminal(
    tmp_path: Path, run_cli: Callable[..., Result]
) -> None:
    words = ["slurm", "distill", "--print", "--labels", tmp_path, "--output", tmp_path]
    words += ["--model", "test_resnet", "--data-dir", tmp_path / "a\x1b[31mb"]
    piped = run_cli(*words)
    assert piped.code == 0, piped.stderr
    assert "a\x1b[31mb" in piped.stdout  # a script must run
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb") as terminal, os.fdopen(theirs, "wb") as stdout:
        command = [sys.executable, ROOT / "cli.py", *words]
        subprocess.run([*map(str, command)], stdout=stdout, check=True)
        shown = terminal.read1(1 << 16)
    assert b"a\\x1b[31mb" in shown
    assert b"\x1b" not in shown
