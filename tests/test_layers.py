"""Who may import whom: cli -> commands -> support -> mealv2, downward only, without circles."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import cli

ROOT = Path(cli.__file__).resolve().parent

# Everything else in pipeline/ is a command: one module or folder each.
SUPPORT = {
    "command_line",
    "training",
    "comparison",
    "labelling",
    "loading",
    "runtime",
    "config",
    "console",
    "compile",
    "timing",
    "load_model",
}
GROUP = "pipeline.label_sets"  # each of its modules is a command, except those that they share
SHARED = {"writing", "reading", "relabel", "image_order", "shard_checks"}
SHARED |= {"import_sre2l", "export_sre2l"}
DRIVERS = {"demo", "push"}  # commands that call other commands
ENTRY = "mealv2.__main__"  # `python -m mealv2`: the only module of the library that imports cli

# What these import of our own packages, besides themselves.
ALLOWED = {
    "mealv2.errors": set[str](),
    "mealv2.storage": {"mealv2.errors"},
    "mealv2.codec": {"mealv2.errors"},
    "mealv2.own_code": {"mealv2.errors"},
    "mealv2.models": {"mealv2.errors", "mealv2.own_code", "mealv2.storage"},
    "mealv2.recipes": {"mealv2.errors"},
    "mealv2.hash_draws": set[str](),
    "mealv2.view_operations": {"mealv2.hash_draws"},
    "mealv2.view_recipe": {"mealv2.hash_draws", "mealv2.view_operations"},
    "mealv2.data": {
        *("mealv2.errors", "mealv2.own_code", "mealv2.storage"),
        *("mealv2.view_boxes", "mealv2.view_operations", "mealv2.view_recipe", "mealv2.views"),
    },
    "pipeline.config": {
        *("mealv2", "mealv2.defaults", "mealv2.errors", "mealv2.storage"),
        *("mealv2.teacher_sets", "mealv2.view_operations", "mealv2.view_recipe"),
    },
    "mealv2.teacher_sets": {"mealv2.errors", "mealv2.storage"},
    "mealv2.text": set[str](),
    "mealv2.defaults": set[str](),
    "mealv2.messages": set[str](),
    "mealv2.runtime": {"mealv2.version"},
    "pipeline.runtime": {"mealv2.errors", "mealv2.runtime", "mealv2.storage", "pipeline.config"},
}
TORCH_FREE = ("pipeline.config", "pipeline.runtime.env")

# Optional packages, imported where they are used; and a part of torch that some builds lack.
OPTIONAL = {
    "aiohttp",
    "datasets",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "mlxtend",
    "onnx",
    "onnxruntime",
    "pi_heif",
    "pillow_heif",
    "pyarrow",
    "pycocotools",
    "scipy",
    "sklearn",
    "trackio",
    "wandb",
}
OPTIONAL |= {"torch.distributed.rendezvous", "torch.utils.tensorboard"}

MAX_FUNCTION, MAX_FILE = 60, 350
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
EXITS = {"sys.exit", "os._exit", "exit", "quit", "print"}


def sources(root: Path) -> dict[str, str]:
    """Return the code of the product by path."""
    paths = [root / "cli.py", *root.glob("mealv2/**/*.py"), *root.glob("pipeline/**/*.py")]
    return {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in sorted(paths)}


def module_name(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


# --- imports, calls ---


def violations(root: Path) -> list[str]:
    """Return every breach of the rules in a tree, as ``file:line what``."""
    return [breach for name, code in sources(root).items() for breach in _found(name, code, root)]


def _found(name: str, code: str, root: Path) -> list[str]:
    return [f"{name}:{line} {what}" for line, what in _breaches(name, ast.parse(code), root)]


def _breaches(name: str, tree: ast.AST, root: Path) -> Iterator[tuple[int, str]]:
    module = module_name(name)
    for node, in_function in _nodes(tree):
        for target in _imports(node, name, root):
            if reason := _may_not_import(module, target):
                yield node.lineno, f"imports {target}: {reason}"
            if in_function and module != "cli" and not _is_optional(target):
                yield node.lineno, f"imports {target} inside a function: hides circles"
        if module != "pipeline.runtime.env" and _reads_environment(node):
            yield node.lineno, "reads the environment"
        if module.split(".")[0] == "mealv2":
            if isinstance(node, ast.Call) and ast.unparse(node.func) in EXITS:
                yield node.lineno, f"calls {ast.unparse(node.func)}"
            if isinstance(node, ast.Name) and node.id == "SystemExit":
                yield node.lineno, "calls SystemExit"


def _nodes(tree: ast.AST, *, in_function: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield all nodes, and whether each runs only when a function is called."""
    for node in ast.iter_child_nodes(tree):
        yield node, in_function
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _nodes(node, in_function=in_function or is_function)


def _may_not_import(module: str, target: str) -> str | None:
    """Return why ``module`` may not import ``target``, or None where it may."""
    package, other = module.split(".")[0], target.split(".")
    if (module, target) == (ENTRY, "cli"):
        return None
    if package == "mealv2" and other[0] in ("pipeline", "cli", "click"):
        return "the library knows no command line"
    if package == "pipeline" and other[0] == "cli":
        return "nothing is above the command line"
    if other[0] == "h5py" and _folder(module) != "mealv2.label_set":
        return "only mealv2.label_set knows the file format"
    if other[0] == "torch" and (module in TORCH_FREE or _folder(module) in TORCH_FREE):
        return "the command line starts without torch"
    return _between_commands(module, target) or _above(module, target)


def _between_commands(module: str, target: str) -> str | None:
    """Return why a module of pipeline/ may not import a command, or None where it may."""
    command, mine = _command(target), _command(module)
    if not module.startswith("pipeline.") or command is None or command == mine:
        return None
    if command.split(".")[-1] in DRIVERS:
        return "only the command line calls a driver"
    if mine is None:
        return "support never imports a command"
    return None if mine.split(".")[-1] in DRIVERS else "commands never import each other"


def _command(module: str) -> str | None:
    """Return the command that a module is, or is a part of; None for all others."""
    words = module.split(".")
    if words[0] != "pipeline" or len(words) == 1 or words[1] in SUPPORT:
        return None
    if _folder(module) != GROUP:
        return _folder(module)
    return None if len(words) == 2 or words[2] in SHARED else ".".join(words[:3])


def _above(module: str, target: str) -> str | None:
    """Return why a module at the bottom may not import another of ours."""
    mine, other = _folder(module), _folder(target)
    if mine not in ALLOWED or mine == other or other.split(".")[0] not in ("mealv2", "pipeline"):
        return None
    return None if other in ALLOWED[mine] else f"{mine} is below {other}"


def _folder(module: str) -> str:
    """Return the folder or module at the second level: pipeline.training of its parts."""
    return ".".join(module.split(".")[:2])


def _is_optional(target: str) -> bool:
    return target in OPTIONAL or target.split(".")[0] in OPTIONAL


def _imports(node: ast.AST, name: str, root: Path) -> list[str]:
    """Return the dotted names that a node imports."""
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
    """``from pipeline import console`` imports pipeline.console; ``from os import path``, os."""
    inside = root / base.replace(".", "/")
    is_module = (inside / f"{name}.py").exists() or (inside / name / "__init__.py").exists()
    return f"{base}.{name}" if is_module else base


def _reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return ast.unparse(node.value) == "os" and node.attr in ENVIRONMENT
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in ENVIRONMENT for alias in node.names)
    return False


# --- circles ---


def import_edges(code_of: dict[str, str], root: Path) -> set[tuple[str, str]]:
    """Return who imports whom among our own modules, anywhere in a file."""
    ours = {module_name(name) for name in code_of}
    return {
        (module_name(name), target)
        for name, code in code_of.items()
        for node in ast.walk(ast.parse(code))
        for target in _imports(node, name, root)
        if target in ours and target != module_name(name)
    }


def folder_edges(edges: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return who imports whom among folders and modules at the second level."""
    folders = {(_folder(module), _folder(target)) for module, target in edges}
    return {(a, b) for a, b in folders if a != b and "." in a and "." in b}


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others."""
    targets: dict[str, set[str]] = {}
    for module, target in edges:
        targets.setdefault(module, set()).add(target)
    reached = {module: _reached(module, targets) for module in targets}
    groups = {
        frozenset(other for other in reached[module] if module in reached.get(other, ()))
        for module in targets
        if module in reached[module]
    }
    return sorted(sorted(group) for group in groups)


def _reached(module: str, targets: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    left = [module]
    while left:
        new = targets.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


# --- sizes ---


def long_functions(code_of: dict[str, str]) -> dict[str, int]:
    """Return the functions of too many lines, as ``file name``."""
    return {
        f"{name} {node.name}": node.end_lineno - node.lineno + 1
        for name, code in code_of.items()
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION
    }


def long_files(code_of: dict[str, str]) -> dict[str, int]:
    """Return the files of too many lines."""
    sizes = {name: len(code.splitlines()) for name, code in code_of.items()}
    return {name: size for name, size in sizes.items() if size > MAX_FILE}


# --- tests ---


def test_the_import_rules_hold() -> None:
    assert violations(ROOT) == []


def test_no_module_imports_itself_through_others() -> None:
    edges = import_edges(sources(ROOT), ROOT)
    assert len(edges) > 100
    assert circles(edges) == []


def test_no_folder_imports_itself_through_others() -> None:
    assert circles(folder_edges(import_edges(sources(ROOT), ROOT))) == []


def test_no_function_is_too_long() -> None:
    assert long_functions(sources(ROOT)) == {}


def test_no_file_is_too_long() -> None:
    assert long_files(sources(ROOT)) == {}


@pytest.mark.parametrize(
    ("name", "line", "named"),
    [
        ("mealv2/views.py", "import pipeline.console", "imports pipeline.console"),
        ("mealv2/models/weights.py", "from pipeline import console", "imports pipeline.console"),
        (
            "mealv2/label_set/shard.py",
            "from pipeline.config import flag",
            "imports pipeline.config",
        ),
        ("mealv2/errors.py", "import cli", "imports cli"),
        ("mealv2/errors.py", "from mealv2 import views", "mealv2.errors is below mealv2.views"),
        ("mealv2/storage/atomic.py", "import click", "imports click"),
        ("mealv2/storage/atomic.py", "import os\nos.environ['HOME']", "reads the environment"),
        ("mealv2/storage/atomic.py", "import os\nos.getenv('HOME')", "reads the environment"),
        ("mealv2/data/folder.py", "from os import environ", "reads the environment"),
        ("mealv2/__main__.py", "from pipeline import console", "imports pipeline.console"),
        ("mealv2/task.py", "print('hello')", "calls print"),
        ("mealv2/task.py", "import sys\nsys.exit(1)", "calls sys.exit"),
        ("mealv2/task.py", "raise SystemExit(1)", "calls SystemExit"),
        ("mealv2/targets.py", "import h5py", "imports h5py"),
        (
            "mealv2/metrics.py",
            "import importlib\nimportlib.import_module('pipeline.console')",
            "imports pipeline.console",
        ),
        (
            "mealv2/storage/atomic.py",
            "from mealv2.data.image_files import EXTENSIONS",
            "mealv2.storage is below mealv2.data",
        ),
        (
            "mealv2/models/weights.py",
            "from mealv2.label_set import LabelSet",
            "mealv2.models is below mealv2.label_set",
        ),
        (
            "mealv2/data/folder.py",
            "from mealv2.models import Classifier",
            "mealv2.data is below mealv2.models",
        ),
        (
            "mealv2/data/folder.py",
            "def f():\n    from mealv2.data.tar import TarShards",
            "imports mealv2.data.tar inside a function",
        ),
        (
            "pipeline/training/loop.py",
            "def f():\n    import torchvision",
            "imports torchvision inside a function",
        ),
        (
            "pipeline/console.py",
            "def f():\n    __import__('pipeline.training.loop')",
            "imports pipeline.training.loop inside a function",
        ),
        ("pipeline/distill.py", "from pipeline import precompute", "imports pipeline.precompute"),
        ("pipeline/distill.py", "from . import finetune", "imports pipeline.finetune"),
        ("pipeline/evaluate.py", "from pipeline.distill import run", "imports pipeline.distill"),
        ("mealv2/data/loader.py", "import pipeline.evaluate", "imports pipeline.evaluate"),
        ("pipeline/training/loop.py", "from ..distill import run", "imports pipeline.distill"),
        ("pipeline/console.py", "import cli", "imports cli"),
        ("pipeline/console.py", "import os\nos.environ.get('TERM')", "reads the environment"),
        ("pipeline/precompute.py", "from h5py import File", "imports h5py"),
        ("pipeline/precompute.py", "from pipeline import demo", "imports pipeline.demo"),
        (
            "pipeline/runtime/device.py",
            "from pipeline.training.loop import train",
            "pipeline.runtime is below pipeline.training",
        ),
        ("pipeline/runtime/env.py", "import torch", "starts without torch"),
        ("pipeline/config/base.py", "from torch import nn", "starts without torch"),
        (
            "pipeline/config/base.py",
            "from pipeline import console",
            "pipeline.config is below pipeline.console",
        ),
        (
            "pipeline/label_sets/merge.py",
            "from pipeline.label_sets import convert",
            "imports pipeline.label_sets.convert: commands never",
        ),
        (
            "pipeline/label_sets/split.py",
            "from pipeline.label_sets.merge import run",
            "imports pipeline.label_sets.merge: commands never",
        ),
        (
            "pipeline/label_sets/export.py",
            "from pipeline import distill",
            "imports pipeline.distill: commands never",
        ),
        (
            "pipeline/label_sets/writing.py",
            "from pipeline.label_sets.info import run",
            "imports pipeline.label_sets.info: support never",
        ),
        (
            "pipeline/distill.py",
            "from pipeline.label_sets.info import run",
            "imports pipeline.label_sets.info: commands never",
        ),
        ("pipeline/bench/lines.py", "from pipeline import distill", "commands never"),
        ("pipeline/slurm/sweep.py", "from pipeline import distill", "commands never"),
        ("pipeline/slurm/scripts.py", "import os\nos.getenv('PATH')", "reads the environment"),
        ("pipeline/distill.py", "from pipeline.bench.lines import Line", "commands never"),
        ("pipeline/timing.py", "from pipeline.bench.lines import Line", "support never"),
        (
            "pipeline/training/label_source.py",
            "from pipeline.label_sets.info import run",
            "imports pipeline.label_sets.info: support never",
        ),
        ("cli.py", "import os\nos.getenv('HOME')", "reads the environment"),
    ],
)
def test_a_planted_breach_is_found(name: str, line: str, named: str) -> None:
    code = (ROOT / name).read_text("utf-8")
    assert _found(name, code, ROOT) == []
    (found,) = set(_found(name, f"{code}\n{line}\n", ROOT))
    assert found.startswith(f"{name}:")
    assert named in found


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mealv2/views.py", "from mealv2.storage.atomic import write_whole"),
        ("mealv2/__main__.py", "import cli"),
        ("pipeline/bench/__init__.py", "from pipeline.bench import lines"),
        ("mealv2/label_set/reader.py", "import h5py"),
        ("pipeline/distill.py", "from pipeline.training import evaluator, loop"),
        ("pipeline/training/label_source.py", "from pipeline.labelling import annotate"),
        ("pipeline/runtime/env.py", "import os\nos.environ['HOME']"),
        ("pipeline/demo/workers.py", "from pipeline import distill, precompute"),
        ("pipeline/demo/pictures.py", "def f():\n    import mlxtend.data"),
        ("pipeline/label_sets/merge.py", "from pipeline.label_sets.writing import Writer"),
        ("pipeline/label_sets/verify.py", "from pipeline.label_sets.relabel import relabel"),
        ("cli.py", "from pipeline import config"),
        ("cli.py", "def f():\n    import torch"),
    ],
)
def test_what_the_rules_allow_is_not_found(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cli.py").touch()
    for module in ("distill", "precompute", "config", "training/evaluator", "training/loop"):
        path = tmp_path / "pipeline" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / name).write_text(line + "\n")
    assert violations(tmp_path) == []


def test_a_planted_circle_is_found() -> None:
    code_of = {
        "mealv2/views.py": "from mealv2.storage import atomic",
        "mealv2/storage/atomic.py": "from mealv2.storage.cache import Cache",
        "mealv2/storage/cache.py": "def hidden():\n    import mealv2.views",
    }
    edges = import_edges(code_of, ROOT)
    assert circles(edges) == [["mealv2.storage.atomic", "mealv2.storage.cache", "mealv2.views"]]
    assert circles(folder_edges(edges)) == [["mealv2.storage", "mealv2.views"]]
    edges.remove(("mealv2.storage.cache", "mealv2.views"))
    assert circles(edges) == []


def test_a_circle_of_folders_is_found_where_their_modules_make_none() -> None:
    edges = {("pipeline.a.one", "pipeline.b.one"), ("pipeline.b.two", "pipeline.a.two")}
    assert circles(edges) == []
    assert circles(folder_edges(edges)) == [["pipeline.a", "pipeline.b"]]


def test_sizes_are_counted_in_lines() -> None:
    allowed = "def f():\n" + "    pass\n" * (MAX_FUNCTION - 1)
    assert long_functions({"a.py": allowed}) == {}
    assert long_functions({"a.py": f"{allowed}    pass\n"}) == {"a.py f": MAX_FUNCTION + 1}
    assert long_files({"a.py": "\n" * (MAX_FILE + 1), "b.py": "\n" * MAX_FILE}) == {
        "a.py": MAX_FILE + 1
    }


def test_names_in_the_rules_exist() -> None:
    there = {path.stem for path in (ROOT / "pipeline").iterdir()}
    assert there >= SUPPORT | DRIVERS
    assert {module_name(name) for name in sources(ROOT)} >= ALLOWED.keys() | set(TORCH_FREE)


def test_every_command_of_the_command_line_is_a_module_here_and_the_other_way_round() -> None:
    there = {_command(module_name(name)) for name in sources(ROOT)} - {None, "pipeline.slurm"}
    named = {
        module if module.startswith(f"{GROUP}.") else _folder(module)
        for module in map(cli.module_of, cli.COMMANDS)
    }
    assert there == named - {"pipeline.slurm"}


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
    "module",
    [
        "mealv2",
        "mealv2.views",
        "mealv2.errors",
        "mealv2.storage.atomic",
        "mealv2.recipes",
        "mealv2.data.source",
        "pipeline.config",
        "pipeline.runtime.env",
    ],
)
def test_modules_without_tensors_are_imported_without_torch(module: str) -> None:
    assert "torch" not in _imported_by(f"import {module}")
