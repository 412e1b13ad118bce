"""The import rule of the house: cli -> stages -> support -> mealv2, always downward."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli

ROOT = Path(cli.__file__).resolve().parent

# Every other module of pipeline/ is support.
STAGES = {
    "pack",
    "precompute",
    "distill",
    "finetune",
    "evaluate",
    "predict",
    "export",
    "bench",
    "slurm",
}
GROUP = "pipeline.label_sets"  # its modules are stages too, but for what they share
SHARED = {"writing", "relabel"}
DRIVERS = {"demo"}  # run stages one after the other
ENTRY = "mealv2.__main__"  # `python -m mealv2`: of the library it alone knows the command line

ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
EXITS = {"sys.exit", "os._exit", "exit", "quit", "print"}


def violations(root: Path) -> list[str]:
    """Return every breach of the rule in a tree, as ``file:line what``."""
    paths = sorted([root / "cli.py", *root.glob("mealv2/**/*.py"), *root.glob("pipeline/**/*.py")])
    found = []
    for path in paths:
        found += _violations_of(path.relative_to(root).as_posix(), path.read_text("utf-8"), root)
    return found


def _violations_of(name: str, code: str, root: Path) -> list[str]:
    return [f"{name}:{line} {what}" for line, what in _breaches(name, ast.parse(code), root)]


def _breaches(name: str, tree: ast.AST, root: Path) -> Iterator[tuple[int, str]]:
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    in_library = name.startswith("mealv2/")
    for node in ast.walk(tree):
        for target in _imports(node, name, root):
            if reason := _may_not_import(module, target):
                yield node.lineno, f"imports {target}: {reason}"
        if module != "pipeline.environment" and _reads_environment(node):
            yield node.lineno, "reads the environment"
        if in_library and isinstance(node, ast.Call) and ast.unparse(node.func) in EXITS:
            yield node.lineno, f"calls {ast.unparse(node.func)}"
        if in_library and isinstance(node, ast.Name) and node.id == "SystemExit":
            yield node.lineno, "calls SystemExit"


def _may_not_import(module: str, target: str) -> str | None:
    """Return why ``module`` may not import ``target``, or None where it may."""
    package, name = module.split(".")[0], module.split(".")[-1]
    other = target.split(".")
    if package == "mealv2" and other[0] in ("pipeline", "cli", "click"):
        if (module, target) == (ENTRY, "cli"):
            return None
        return "the library knows no command line"
    if package == "pipeline" and other[0] == "cli":
        return "nothing is above the command line"
    if reason := _between_stages_of_the_group(module, target):
        return reason
    if package == "pipeline" and other[0] == "pipeline" and len(other) > 1:
        if other[1] in DRIVERS:
            return "a driver is called by the command line alone"
        in_group = module.startswith(f"{GROUP}.")
        if other[1] == module.split(".")[1]:
            return None  # a stage of several rooms
        if other[1] in STAGES and (module.split(".")[1] in STAGES or in_group):
            return "stages never import each other"
        if other[1] in STAGES and name not in DRIVERS:
            return "support never imports a stage"
    if other[0] == "h5py" and not module.startswith("mealv2.label_set"):
        return "only mealv2.label_set knows the file format"
    return None


def _between_stages_of_the_group(module: str, target: str) -> str | None:
    """Return why a module may not import one of the stages in the group."""
    if not target.startswith(f"{GROUP}.") or target.split(".")[2] in SHARED:
        return None
    if module.startswith(f"{GROUP}.") or module.split(".")[1:2] in [[name] for name in STAGES]:
        return "stages never import each other"
    return "support never imports a stage" if module.startswith("pipeline.") else None


def _imports(node: ast.AST, name: str, root: Path) -> list[str]:
    """Return the dotted names that a node imports, here or inside a function."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = name.split("/")[: -node.level]
            base = ".".join([*above, *([base] if base else [])])
        return [_module_or_name(base, alias.name, root) for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
        ("import_module", "__import__")
    ):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def _module_or_name(base: str, name: str, root: Path) -> str:
    """``from pipeline import logs`` imports pipeline.logs; ``from os import path`` imports os."""
    inside = root / base.replace(".", "/")
    is_module = (inside / f"{name}.py").exists() or (inside / name / "__init__.py").exists()
    return f"{base}.{name}" if is_module else base


def _reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return (
            isinstance(node.value, ast.Name) and node.value.id == "os" and node.attr in ENVIRONMENT
        )
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in ENVIRONMENT for alias in node.names)
    return False


def test_the_import_rule_holds() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("name", "line", "named"),
    [
        ("mealv2/views.py", "import pipeline.logs", "imports pipeline.logs"),
        ("mealv2/models/classifier.py", "from pipeline import logs", "imports pipeline.logs"),
        (
            "mealv2/label_set/shard.py",
            "from pipeline.config import flag",
            "imports pipeline.config",
        ),
        ("mealv2/errors.py", "import cli", "imports cli"),
        ("mealv2/storage/atomic.py", "def f():\n    import click", "imports click"),
        ("mealv2/storage/atomic.py", "import os\nos.environ['HOME']", "reads the environment"),
        ("mealv2/storage/atomic.py", "import os\nos.getenv('HOME')", "reads the environment"),
        ("mealv2/data/folder.py", "from os import environ", "reads the environment"),
        ("mealv2/__main__.py", "from pipeline import logs", "imports pipeline.logs"),
        ("mealv2/task.py", "print('hello')", "calls print"),
        ("mealv2/task.py", "import sys\nsys.exit(1)", "calls sys.exit"),
        ("mealv2/task.py", "raise SystemExit(1)", "calls SystemExit"),
        ("mealv2/targets.py", "import h5py", "imports h5py"),
        (
            "mealv2/metrics.py",
            "import importlib\nimportlib.import_module('pipeline.logs')",
            "imports pipeline.logs",
        ),
        ("pipeline/distill.py", "from pipeline import precompute", "imports pipeline.precompute"),
        ("pipeline/distill.py", "from . import finetune", "imports pipeline.finetune"),
        ("pipeline/evaluate.py", "from pipeline.distill import run", "imports pipeline.distill"),
        ("pipeline/loading/loader.py", "import pipeline.evaluate", "imports pipeline.evaluate"),
        ("pipeline/training.py", "from .distill import run", "imports pipeline.distill"),
        ("pipeline/logs.py", "import cli", "imports cli"),
        ("pipeline/logs.py", "import os\nos.environ.get('TERM')", "reads the environment"),
        ("pipeline/precompute.py", "from h5py import File", "imports h5py"),
        ("pipeline/precompute.py", "from pipeline import demo", "imports pipeline.demo"),
        (
            "pipeline/label_sets/merge.py",
            "from pipeline.label_sets import convert",
            "imports pipeline.label_sets.convert: stages never",
        ),
        (
            "pipeline/label_sets/split.py",
            "from pipeline.label_sets.merge import run",
            "imports pipeline.label_sets.merge: stages never",
        ),
        (
            "pipeline/label_sets/export.py",
            "from pipeline import distill",
            "imports pipeline.distill: stages never",
        ),
        (
            "pipeline/label_sets/writing.py",
            "from pipeline.label_sets.info import run",
            "imports pipeline.label_sets.info: stages never",
        ),
        (
            "pipeline/distill.py",
            "from pipeline.label_sets.info import run",
            "imports pipeline.label_sets.info: stages never",
        ),
        ("pipeline/bench/lines.py", "from pipeline import distill", "stages never"),
        ("pipeline/slurm/sweep.py", "from pipeline import distill", "stages never"),
        ("pipeline/slurm/scripts.py", "import os\nos.getenv('PATH')", "reads the environment"),
        ("pipeline/distill.py", "from pipeline.bench.room import Room", "stages never"),
        ("pipeline/measuring.py", "from pipeline.bench.room import Room", "support never"),
        (
            "pipeline/labels.py",
            "from pipeline.label_sets.info import run",
            "imports pipeline.label_sets.info: support never",
        ),
        ("cli.py", "import os\nos.getenv('HOME')", "reads the environment"),
    ],
)
def test_a_planted_breach_is_found(name: str, line: str, named: str) -> None:
    code = (ROOT / name).read_text("utf-8")
    assert _violations_of(name, code, ROOT) == []
    (found,) = set(_violations_of(name, f"{code}\n{line}\n", ROOT))
    assert found.startswith(f"{name}:")
    assert named in found


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mealv2/views.py", "from mealv2.storage.atomic import write_whole"),
        ("mealv2/__main__.py", "import cli"),
        ("pipeline/bench/__init__.py", "from pipeline.bench import lines"),
        ("mealv2/label_set/reader.py", "import h5py"),
        ("pipeline/distill.py", "from pipeline import evaluation, training"),
        ("pipeline/environment.py", "import os\nos.environ['HOME']"),
        ("pipeline/demo.py", "from pipeline import distill, precompute"),
        ("pipeline/label_sets/merge.py", "from pipeline.label_sets.writing import Writer"),
        ("pipeline/label_sets/verify.py", "from pipeline.label_sets.relabel import relabel"),
        ("cli.py", "from pipeline import config"),
    ],
)
def test_what_the_rule_allows_is_not_found(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cli.py").touch()
    for module in ("evaluation", "training", "distill", "precompute", "config"):
        (tmp_path / "pipeline").mkdir(exist_ok=True)
        (tmp_path / "pipeline" / f"{module}.py").touch()
    (tmp_path / name).write_text(line + "\n")
    assert violations(tmp_path) == []


def test_stages_and_drivers_named_here_exist() -> None:
    there = {path.stem for path in (ROOT / "pipeline").iterdir()}
    assert there >= STAGES
    group = {path.stem for path in (ROOT / GROUP.replace(".", "/")).glob("*.py")}
    assert {
        cli.module_of(name).rpartition(".")[2]
        for name in cli.COMMANDS
        if name.startswith("labels ")
    } == (group - SHARED - {"__init__"})


def _imported_by(statement: str) -> set[str]:
    """Run a statement in a fresh interpreter; return the top-level names of what it imported."""
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_command_line_is_imported_without_torch_or_numpy() -> None:
    imported = _imported_by("import cli")
    assert {"cli", "click", "mealv2", "pipeline"} <= imported
    assert not {"torch", "numpy", "timm", "h5py", "PIL"} & imported


@pytest.mark.parametrize(
    "module", ["mealv2.views", "mealv2.errors", "mealv2.storage.atomic", "mealv2.recipes"]
)
def test_rooms_without_tensors_are_imported_without_torch(module: str) -> None:
    assert "torch" not in _imported_by(f"import {module}")
