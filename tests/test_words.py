"""The words of the field, in names and in text: the list of docs/adr/0022 holds and grows."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Names that nothing in the code may have: a class, function, parameter, variable or attribute.
NAMES = {
    *("Answer", "Answers", "answer", "answers", "Learned", "Machine", "machine", "Pixels"),
    *("Place", "place", "places", "Places", "Ready", "Request", "Role", "role", "Work", "Labeller"),
    *("share", "shares", "own_share", "soft", "say", "here", "who", "ours", "theirs", "mine"),
    *("there", "labels_taught", "goes_on", "is_first", "finish_and_tell", "width_of_pass"),
}
# Words that no name may contain: names are split at underscores and capitals.
WORDS = {
    *("told", "tell", "said", "says", "talk", "speaks", "spoken", "lacking", "lacks", "lack"),
    *("anew", "taught", "teach", "learned", "foresee", "foresight", "insist", "refuse", "behind"),
    *("stray", "strays", "legend", "renew", "bring", "wake", "maker", "strange"),
}
# What text may not contain: docstrings, messages, README and docs.
PHRASES = {
    "told",
    "lacking",
    "anew",
    "labels_taught",
    "goes on",
    "go on",
    "gives way",
    "in good order",
    "broken off",
    "breaks off",
    "there whole",
    "is not there whole",
    "a loss which is not finite has spoilt",
    "when the connection is well",
    "flags go before it",
    "the networks limits it",
    "Talk goes to",
    "of others",
    "nobody knows",
    "in vain",
    "looked for in vain",
    "a person says",
    "a person calls",
    "what it lacks",
    "is not to be had",
    "taken up",
    "takes up",
    "Take up",
    "who answers",
    "is no label set",
    "is no JPEG",
    "holds no run",
}
# The flag --role and its field keep their name.
FIELDS = {("pipeline/config/label_sets.py", "role")}
# Not enforced yet: some text still has them. A phrase leaves with its last use, none comes in.
PENDING = PHRASES - {"labels_taught", "broken off", "is not to be had", "the networks limits it"}


def violations(root: Path) -> Iterator[str]:
    """Yield every forbidden name and phrase below a folder, with its file and line."""
    files = [*root.glob("mealv2/**/*.py"), *root.glob("pipeline/**/*.py"), root / "cli.py"]
    for path in sorted(filter(Path.exists, files)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        where = path.relative_to(root)
        for line, name in _names(tree):
            if (where.as_posix(), name) in FIELDS:
                continue
            if name in NAMES or WORDS & set(_split(name)):
                yield f"{where}:{line}: the name {name}"
        for line, text in _texts(tree):
            yield from (f"{where}:{line}: {phrase!r}" for phrase in _phrases(text))
    for path in sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")]):
        if path.name == "0022-words.md":  # it lists the old names
            continue
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            where = path.relative_to(root)
            yield from (f"{where}:{line}: {phrase!r}" for phrase in _phrases(text))


def _names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield what code names: definitions, parameters, variables, attributes that it sets."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr
            case ast.alias(asname=str(name)):
                yield node.lineno, name


def _split(name: str) -> list[str]:
    """Return the words of a name, in lower case."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return [word.lower() for word in spaced.split("_") if word]


def _texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield docstrings and messages: string literals of several words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, " ".join(node.value.split())


def _phrases(text: str) -> list[str]:
    return [p for p in PHRASES - PENDING if re.search(rf"(?<![\w-]){re.escape(p)}(?![\w-])", text)]


def test_no_forbidden_word_is_used() -> None:
    assert list(violations(ROOT)) == []


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("def insist_on_the_same_work(config): ...", "insist_on_the_same_work"),
        ("class Work: ...", "Work"),
        ("class AlreadySaid(Exception): ...", "AlreadySaid"),
        ("def run(machine): ...", "machine"),
        ("def run():\n    told = 1", "told"),
        ("class A:\n    def __init__(self):\n        self.place = 0", "place"),
        ("COUNT = 'labels_taught and others'", "'labels_taught'"),
        ('"""Count labels_taught of a batch."""', "'labels_taught'"),
        ("raise ValueError(f'{1} labels_taught here')", "'labels_taught'"),
    ],
)
def test_a_planted_word_is_found(tmp_path: Path, code: str, named: str) -> None:
    path = tmp_path / "pipeline" / "planted.py"
    path.parent.mkdir()
    path.write_text(code, encoding="utf-8")
    found = list(violations(tmp_path))
    assert len(found) == 1
    assert found[0].startswith("pipeline/planted.py:")
    assert found[0].endswith(named)


def test_a_planted_phrase_in_a_document_is_found(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Fine.\nThe column labels_taught.\n", encoding="utf-8")
    assert list(violations(tmp_path)) == ["README.md:2: 'labels_taught'"]


@pytest.mark.parametrize(
    "code",
    [
        "for name, value in {}.items(): ...",
        "l1_soft = first = first_key = 1",
        "def place_order(): ...",
        "threshold = shared_memory = teacher = 1",
        "import platform\nfound = platform.machine()",
        '"""Return the whole batch; the first rank shares it."""',
        "missing = {'teach': 1}",
    ],
)
def test_ordinary_words_pass(tmp_path: Path, code: str) -> None:
    path = tmp_path / "mealv2" / "ordinary.py"
    path.parent.mkdir()
    path.write_text(code, encoding="utf-8")
    assert list(violations(tmp_path)) == []
