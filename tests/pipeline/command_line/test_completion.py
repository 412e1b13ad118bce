"""Shell completion: the scripts that the command writes, run by the shell."""

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

BIN = Path(sys.executable).parent
SHELLS = ("bash", "zsh", "fish")


def run(command: list[str], **variables: str) -> str:
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | variables
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout


def start_line() -> str:
    """Return the line of the documentation for ~/.bashrc."""
    page = (ROOT / "docs" / "how-to" / "completion.md").read_text(encoding="utf-8")
    line = re.search(r"`(eval [^`]*bash_source[^`]*)`", page)
    assert line is not None
    return line[1]


def completed_by_bash(folder: Path, *words: str) -> list[str]:
    """Return what bash offers for the last word."""
    quoted = " ".join(map(shlex.quote, ["mealv2", *words]))
    script = (
        f"cd {shlex.quote(str(folder))}\n{start_line()}\n"
        f"COMP_WORDS=({quoted})\nCOMP_CWORD={len(words)}\n"
        "registered=($(complete -p mealv2))\n"  # complete … -F FUNCTION mealv2
        '"${registered[-2]}" mealv2\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    return run(["bash", "-c", script]).split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("ex",), {"export"}),
        (("labels", "ver"), {"verify"}),
        (("distill", "--warmup-e"), {"--warmup-epochs"}),
        (("export", "run", "--to", "t"), {"timm", "torchscript"}),
    ],
)
def test_bash_completes_commands_options_and_choices(
    tmp_path: Path, words: tuple[str, ...], expected: set[str]
) -> None:
    assert set(completed_by_bash(tmp_path, *words)) == expected


@pytest.mark.parametrize("words", ["evaluate --data-dir", "export"])
def test_bash_on_a_terminal_completes_paths(tmp_path: Path, words: str) -> None:
    """Bash completes files by itself where the command asks it to, which takes the Tab key."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "rc").write_text(f"PATH='{BIN}':$PATH\nPS1=\n{start_line()}\n")
    keyboard, terminal = pty.openpty()
    # Tab; then to the begin of the line, which becomes the words of an echo
    os.write(keyboard, f"mealv2 {words} pic\t\x01echo \nexit\n".encode())
    result = subprocess.run(
        ["bash", "--rcfile", "rc", "-i"],
        stdin=terminal,
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"TERM": "dumb"},
        start_new_session=True,
        text=True,
    )
    os.close(keyboard)
    os.close(terminal)
    assert result.stdout == f"mealv2 {words} pictures/\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_a_script_that_it_can_read(tmp_path: Path, shell: str) -> None:
    script = run([str(BIN / "mealv2")], _MEALV2_COMPLETE=f"{shell}_source")
    assert f"_MEALV2_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        path = tmp_path / "script"
        path.write_text(script)
        run([shell, "-n", str(path)])


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_command_answers_the_scripts_of_other_shells(shell: str) -> None:
    """With the variables that the scripts set; these shells need not be installed."""
    variables = {"zsh": {"COMP_WORDS": "mealv2 ex", "COMP_CWORD": "1"}}.get(
        shell, {"COMP_WORDS": "mealv2 ex", "COMP_CWORD": "ex"}
    )
    found = run([str(BIN / "mealv2")], _MEALV2_COMPLETE=f"{shell}_complete", **variables)
    assert "export" in found
    assert "evaluate" not in found
