"""Give damaged files and odd values to every command: no traceback, no hang, one line of error.

    python benchmarks/fuzz_commands.py FOLDER --cases 5000
    python benchmarks/fuzz_commands.py FOLDER --only 137     # shows one case

One process imports everything and writes a file of every kind. Each case is a fork of it with a
copy of the files, one of them damaged or one option odd, and with limits of memory and time. Case N
of a seed is the same in every run. FOLDER/results-SEED.jsonl keeps what came of each; run it again
to continue, and to run the cases again that were wrong. Prints Markdown tables, and ends with 1 if
a case was wrong. Linux only.
"""

import argparse
import datetime
import faulthandler
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy starts threads: a fork has none

import aiohttp  # noqa: E402, F401  # a fork imports nothing
import torch  # noqa: E402
from fuzz_damage import damage_file, odd_option  # noqa: E402
from fuzz_inputs import COMMANDS, Command, files_of, write_whole  # noqa: E402

import cli  # noqa: E402
from mealv2.storage import transfer, web  # noqa: E402

SEED = 13
MEMORY = 3 << 30  # bytes of address space that a case may take beside the warm process
CPU_S, WALL_S = 30, 120
READ_TIMEOUT_S = 2.0  # of a server; the product waits longer
FILE_BYTES = 1 << 30  # a case may not fill the disk
ODD_OPTIONS = 0.2  # of the cases
MAX_LINE = 2010  # characters of an error that one can read
_CODES = range(5)
_THREADS = ("parquet", "torchscript")


class Outcome(NamedTuple):
    """How a fork ended: its exit code, or minus a signal; its largest resident memory in bytes."""

    code: int
    cpu_s: float
    peak: int
    stderr: str


# --- one case -------------------------------------------------------------------------------------


def prepare(number: int, seed: int, folder: Path) -> tuple[Command, list[str], str, str]:
    """Copy the files of a case into FOLDER/case and damage something.

    Returns the command, its words, what was damaged and how. The first cases are whole.
    """
    rng = random.Random(f"{seed}-{number}")
    is_whole = number < len(COMMANDS)
    command = COMMANDS[number] if is_whole else _draw(rng)
    remove(folder / "case")
    (folder / "case").mkdir()
    for name in command.needs:
        whole, copy = folder / "whole" / name, folder / "case" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if whole.is_dir() else shutil.copy2)(whole, copy)
    if is_whole:
        return command, list(command.words), "nothing", "whole"
    if rng.random() < ODD_OPTIONS:
        words, name = odd_option(rng, command)
        return command, words, "option", name
    kinds = files_of(command, folder / "case")
    kind = rng.choice(sorted(kinds))
    path = rng.choice(kinds[kind])
    return command, list(command.words), kind, damage_file(rng, folder / "case" / path)


def _draw(rng: random.Random) -> Command:
    """Return a command: each name is as frequent as the others, but for three times the stages."""
    names = sorted({command.name for command in COMMANDS})
    names += [name for name in ("precompute", "distill", "finetune", "evaluate") for _ in (1, 2)]
    name = rng.choice(names)
    return rng.choice([command for command in COMMANDS if command.name == name])


def remove(folder: Path) -> None:
    """Remove a folder and what is in it, links not followed."""
    if folder.is_symlink() or folder.exists():
        shutil.rmtree(folder)


def run_case(number: int, seed: int, folder: Path, url: str) -> dict[str, Any]:
    """Run one case; return its record."""
    command, words, target, damage = prepare(number, seed, folder)
    words = [word.replace("URL/", f"{url}/case/") for word in words]
    outcome = forked(lambda: _mealv2(words), folder / "case", folder / "log")
    return {
        "case": number,
        "command": command.name,
        "target": target,
        "damage": damage,
        "code": outcome.code,
        "cpu_s": round(outcome.cpu_s, 2),
        "peak_mb": outcome.peak >> 20,
        "wrong": verdict(outcome, is_whole=damage == "whole"),
        "error": outcome.stderr.strip().rpartition("\n")[2][:500],
    }


def verdict(outcome: Outcome, *, is_whole: bool) -> str:
    """Return what is wrong with the end of a command; empty if nothing is."""
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("mealv2: ")]
    if outcome.code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "time limit"
    if "Traceback" in outcome.stderr:
        return "traceback"
    if outcome.code not in _CODES:
        return f"exit {outcome.code}"
    if re.search(r"^\S*: \w*Warning: ", outcome.stderr, re.MULTILINE):
        return "warning of Python"
    if outcome.code == 0:
        return "error and exit 0" if errors else ""
    if is_whole and "is not finished" not in outcome.stderr:
        return "a whole case failed"
    if len(errors) != 1 or not outcome.stderr.rstrip().endswith(errors[0].rstrip()):
        return "not one line of error"
    return "a long line" if len(errors[0]) > MAX_LINE else ""


def _mealv2(words: list[str]) -> int:
    sys.argv = ["mealv2", *words]
    try:
        cli.main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def forked(run: Callable[[], int], folder: Path, log: Path) -> Outcome:
    """Run a function in a fork, in a folder, with limits; stdout and stderr go to files."""
    pid = os.fork()
    if not pid:
        _child(run, folder, log)
    deadline = time.monotonic() + WALL_S
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    text = log.with_suffix(".err").read_bytes().decode(errors="replace")
    return Outcome(code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10, text)


def _child(run: Callable[[], int], folder: Path, log: Path) -> None:
    code = 99
    try:
        os.setpgid(0, 0)
        for number, suffix in ((1, ".out"), (2, ".err")):
            handle = os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        os.chdir(folder)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = run()
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as the interpreter does
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- the warm process -----------------------------------------------------------------------------


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder by HTTP, in a process of its own; yield the URL."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    with (
        Path(os.devnull).open("w") as null,
        subprocess.Popen(
            [*command, "--directory", folder], stdout=subprocess.PIPE, stderr=null, text=True
        ) as server,
    ):
        try:
            assert server.stdout is not None
            port = re.search(r"port (\d+)", server.stdout.readline())
            assert port is not None
            yield f"http://127.0.0.1:{port[1]}"
        finally:
            server.kill()


def build(folder: Path, url: str) -> None:
    """Write the files of FOLDER/whole once; this process does the same for itself, to be warm."""
    torch.set_num_threads(1)
    # the server waits for ever for a pipe
    web.READ_TIMEOUT_S, transfer.RETRY_DELAY_S = READ_TIMEOUT_S, 0.1

    def isolated(line: str) -> None:
        words = line.replace("URL/", f"{url}/case/").split()
        outcome = forked(lambda: _mealv2(words), folder / "case", folder / "log")
        assert outcome.code == 0, f"mealv2 {line}\n{outcome.stderr}"

    torch.manual_seed(0)
    before = Path.cwd()
    if not (folder / "whole").exists():
        remove(folder / "case")
        (folder / "case").mkdir()
        os.chdir(folder / "case")
        write_whole(folder / "case", isolated)
        os.chdir(before)
        (folder / "case").rename(folder / "whole")
    remove(folder / "case")
    shutil.copytree(folder / "whole", folder / "case")
    os.chdir(folder / "case")
    for command in COMMANDS:
        # these start threads that stay
        if not any("URL/" in word or word in _THREADS for word in command.words):
            remove(folder / "case" / "out")
            with _quiet():
                _mealv2(list(command.words))
    os.chdir(before)
    deadline = time.monotonic() + 60
    while len(list(Path("/proc/self/task").iterdir())) > 1:  # a fork would lose its threads
        if time.monotonic() > deadline:
            faulthandler.dump_traceback()
            sys.exit("a command left a thread in the warm process")
        time.sleep(0.01)


@contextmanager
def _quiet() -> Iterator[None]:
    kept = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as null:
        sys.stdout = sys.stderr = null
        try:
            yield
        finally:
            sys.stdout, sys.stderr = kept


# --- tables ---------------------------------------------------------------------------------------


def table(records: list[dict[str, Any]], key: str) -> str:
    """Return how the commands ended, as Markdown, a row for each value of ``key``."""
    heads = ["cases", *(f"exit {code}" for code in _CODES), "tracebacks", "time limit", "other"]
    heads += ["peak MB", "most s"]
    rows = [[key, *heads], ["---"] * (len(heads) + 1)]
    names = sorted({record[key] for record in records})
    for name in [*names, "all"]:
        some = [record for record in records if name in ("all", record[key])]
        codes = Counter(record["code"] for record in some)
        wrong = Counter(record["wrong"] for record in some)
        other = wrong.total() - wrong[""] - wrong["traceback"] - wrong["time limit"]
        counts = [len(some), *(codes[code] for code in _CODES), wrong["traceback"]]
        counts += [wrong["time limit"], other, max(record["peak_mb"] for record in some)]
        rows.append([name, *map(str, counts), f"{max(record['cpu_s'] for record in some):.1f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Run the cases that have no record yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", type=int, nargs="+", help="show these cases; no record")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", no_proxy="127.0.0.1")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with serving(folder) as url:
        build(folder, url)
        if options.only:
            for number in options.only:
                print(json.dumps(run_case(number, options.seed, folder, url), indent=1))
                print(*prepare(number, options.seed, folder)[1])
                print((folder / "log.err").read_text(errors="replace")[-3000:])
            return
        results = folder / f"results-{options.seed}.jsonl"
        known = read_records(results)
        with results.open("a", encoding="utf-8") as file:
            for number in range(options.cases):
                if number in known and not known[number]["wrong"]:
                    continue
                known[number] = record = run_case(number, options.seed, folder, url)
                file.write(json.dumps(record) + "\n")
                file.flush()
                if record["wrong"]:
                    print(json.dumps(record), flush=True)
    remove(folder / "case")
    records = [known[number] for number in range(options.cases)]
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, ", end="")
    print(f"{datetime.date.today()}, seed {options.seed}; the warm process has ", end="")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB\n")
    for key in ("command", "target", "damage"):
        shown = [r for r in records if key != "damage" or r["target"] != "option"]
        print(table(shown, key), end="\n\n")
    wrong = [record for record in records if record["wrong"]]
    print(f"{len(records)} cases, {len(wrong)} wrong")
    sys.exit(bool(wrong))


def read_records(path: Path) -> dict[int, dict[str, Any]]:
    """Return the newest record of each case; a line that was cut off does not count."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    path.write_bytes(whole)
    records = map(json.loads, whole.splitlines())
    return {record["case"]: record for record in records}


if __name__ == "__main__":
    main()
