"""The rules of the house as tests: who imports whom, how long a file may be, what is public, what tests look like.

Each test collects every breach and prints it as ``file:line: what``, so one run shows all there is to mend.
"""

import ast
import functools
import importlib
import inspect
import io
import json
import pathlib
import re
import subprocess
import tokenize

import pytest

from tools.api_surface import ROOT, SURFACE, declared_names, module_name, public_modules, surface

# --- rules and their exceptions

# Low to high: a file imports only from units to the left of its own.
LADDER = [
    "structures",
    "boxes",
    "coders",
    "priors",
    "default_boxes",
    "scores",
    "kernels",
    "assigners",
    "ssd_assigner",
    "losses",
    "nn",
    "scoring",
    "postprocess",
    "inference",
    "detector",
    "models",
]
BASE = {"structures", "boxes"}
AROUND = {"data", "evaluation", "viz", "explore", "provenance", "checkpoint", "training"}
MAY_IMPORT = {
    **{unit: set(LADDER[:place]) for place, unit in enumerate(LADDER)},
    # They serve anybody's detector, so they know nothing of ours.
    "data": BASE,
    "evaluation": BASE,
    "viz": BASE,
    "explore": set(),
    "provenance": {"checkpoint"},
    "checkpoint": BASE,
    "training": {*BASE, "inference", "detector", "data", "checkpoint"},
    "stored": {*BASE, "scoring", "postprocess"},
    "exercises": {*LADDER, *AROUND},
    "cli": {*LADDER, *AROUND, "exercises"},
    "__main__": {"cli"},
    "": {*LADDER, *AROUND, "exercises"},  # detcore/__init__.py
}

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
# path, or path::function -> why it may be longer. An entry that is no longer needed fails.
LONG: dict[str, str] = {
    "detcore/models/fcos.py::fcos": "names every option and every part on a line of its own",
    "detcore/models/retinanet.py::retinanet": "names every option and every part on a line of its own",
}

# Public functions that still lack a doctest. The list may only shrink.
NO_DOCTEST: set[str] = set()

COMPARISONS = {"allclose", "equal", "isclose", "array_equal", "is_close"}


# --- reading sources


@functools.cache
def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def sources(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def where(path: pathlib.Path, node: ast.AST | int) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{node if isinstance(node, int) else node.lineno}"


def report(rule: str, breaches: list[str]) -> None:
    assert not breaches, f"{rule}\n  " + "\n  ".join(breaches)


@functools.cache
def tracked() -> tuple[pathlib.Path, ...]:
    """Every file under version control or about to be; without git, every file outside folders that tools make."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        paths = [ROOT / name for name in names if name]
    except (OSError, subprocess.CalledProcessError):
        made = re.compile(r"(^|/)(\.venv|\.git|_build|build|__pycache__|[^/]*\.egg-info|\.\w+_cache|\.hypothesis)(/|$)")
        paths = [path for path in ROOT.rglob("*") if not made.search(path.relative_to(ROOT).as_posix())]
    return tuple(sorted(path for path in paths if path.is_file()))


def text_of(path: pathlib.Path) -> str | None:
    """The text of a file, ``None`` if it is binary."""
    content = path.read_bytes()
    return None if b"\0" in content[:4096] else content.decode("utf-8", errors="replace")


# --- architecture


def unit_of(module: str) -> str:
    """``detcore.losses.terms`` -> ``losses``; the package itself -> an empty string."""
    return [*module.split("."), ""][1]


def imported_modules(tree: ast.Module, module: str, is_package: bool) -> list[tuple[int, str]]:
    """Line and dotted name of everything imported from detcore, at the top or inside a function."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            # `from detcore import boxes` names a unit; `from detcore.boxes import iou` does so already.
            found += [(node.lineno, f"{base}.{alias.name}" if base == "detcore" else base) for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "detcore"]


def upward_imports(path: pathlib.Path, tree: ast.Module, module: str) -> list[str]:
    unit = unit_of(module)
    if unit not in MAY_IMPORT:
        return [f"{where(path, 1)}: {module} has no place in MAY_IMPORT; give it one"]
    allowed = MAY_IMPORT[unit] | {unit}
    return [
        f"{where(path, line)}: {module} imports {name}"
        for line, name in imported_modules(tree, module, path.name == "__init__.py")
        if unit_of(name) not in allowed
    ]


def test_files_import_only_from_lower_files():
    breaches = [
        breach for path in sources("detcore") for breach in upward_imports(path, parse(path), module_name(path, ROOT))
    ]
    report("a file imports only from units below its own (MAY_IMPORT)", breaches)


@pytest.mark.parametrize(
    ("module", "statement", "is_allowed"),
    [
        ("detcore.boxes", "from detcore.structures import Targets", True),
        ("detcore.structures", "from detcore.boxes import iou", False),
        ("detcore.structures", "from detcore import boxes", False),
        ("detcore.losses.terms", "from .functional import giou_loss", True),
        ("detcore.losses.terms", "from ..nn import heads", False),
        ("detcore.losses.terms", "def f():\n    import detcore.models", False),
        ("detcore.data.voc", "from detcore.losses import focal_term", False),
        ("detcore.explore", "from detcore.boxes import iou", False),
        ("detcore.boxes", "from torchvision.ops import nms", True),
        ("detcore.newcomer", "import torch", False),
    ],
)
def test_import_rule_tells_up_from_down(module, statement, is_allowed):
    path = ROOT / (module.replace(".", "/") + ".py")
    assert (not upward_imports(path, ast.parse(statement), module)) == is_allowed


def code_lines(source: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function that hold code: not blank, not comment, not docstring."""
    text = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc("\n" + text)).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    if ast.get_docstring(node, clean=False) is not None:
        docstring = node.body[0]
        lines -= set(range(docstring.lineno - node.lineno + 1, docstring.end_lineno - node.lineno + 2))
    return len(lines)


def test_files_and_functions_stay_short():
    breaches, needed = [], set()
    for path in sources("detcore", "tools"):
        name = path.relative_to(ROOT).as_posix()
        source = path.read_text(encoding="utf-8")
        lengths = [(name, 1, len(source.splitlines()), MAX_FILE_LINES)]
        lengths += [
            (f"{name}::{node.name}", node.lineno, code_lines(source, node), MAX_FUNCTION_LINES)
            for node in ast.walk(parse(path))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        for key, line, length, cap in lengths:
            if length > cap:
                needed.add(key)
                if key not in LONG:
                    breaches.append(f"{where(path, line)}: {key} has {length} lines, more than {cap}")
    breaches += [f"tests/test_house.py: LONG lists {key}, which is short now" for key in sorted(set(LONG) - needed)]
    report("split it, or give the reason in LONG", breaches)


def test_code_lines_counts_code_only():
    source = 'def f(x):\n    """Doc.\n\n    More.\n    """\n    # why\n\n    y = [\n        x,\n    ]\n    return y\n'
    [node] = ast.parse(source).body
    assert code_lines(source, node) == 5


# --- the public surface


def test_every_public_module_declares_all():
    missing = [
        f"{where(path, 1)}: {module} has no __all__"
        for module, path in public_modules().items()
        if declared_names(path) is None and path.name != "__main__.py"
    ]
    report("a public module says what it offers", missing)


def test_public_names_are_the_checked_in_ones():
    listed = SURFACE.read_text(encoding="utf-8").splitlines()
    changes = [f"+ {name}" for name in sorted(set(surface()) - set(listed))]
    changes += [f"- {name}" for name in sorted(set(listed) - set(surface()))]
    report("public names changed; if that is meant: make surface, and a line in CHANGELOG.md", changes)


@functools.cache
def load(module: str) -> tuple[object, str]:
    """The imported module and an empty string, or ``None`` and what its import raised."""
    try:
        return importlib.import_module(module), ""
    except Exception as error:  # a module that breaks on import is one line of the report, not its end
        return None, f"{type(error).__name__}: {error}"


def own_public_objects() -> list[tuple[str, object]]:
    """Name and object of every public class and function, once, where it is defined."""
    found = {}
    for module, path in public_modules().items():
        for name in declared_names(path) or ():
            value = getattr(load(module)[0], name, None)
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module:
                found[f"{module}.{name}"] = value
    return sorted(found.items())


def test_every_name_in_all_exists():
    breaches = []
    for module, path in public_modules().items():
        loaded, problem = load(module)
        breaches += [f"{where(path, 1)}: import {module}: {problem[:200]}"] if problem else []
        if loaded is not None:
            names = declared_names(path) or ()
            breaches += [f"{where(path, 1)}: {module}.{name}" for name in names if not hasattr(loaded, name)]
    report("__all__ names what the module does not have", breaches)


def test_no_name_hides_a_module():
    # With a function `download` in detcore.data, detcore.data.download.fetch is no longer the module's.
    hidden = [
        f"{where(path, 1)}: {module}.{name} is a module and a name in __all__"
        for module, path in public_modules().items()
        for name in declared_names(path) or ()
        if f"{module}.{name}" in public_modules() and not inspect.ismodule(getattr(load(module)[0], name, None))
    ]
    report("a package must not export a name that one of its modules has", hidden)


def test_every_public_name_has_a_docstring():
    # A dataclass without a docstring gets its signature as one.
    bare = [
        name
        for name, value in own_public_objects()
        if not (value.__doc__ or "").strip() or value.__doc__.startswith(f"{name.rpartition('.')[2]}(")
    ]
    report("public classes and functions have a docstring", bare)


def test_every_public_function_has_a_doctest():
    functions = {name: value for name, value in own_public_objects() if inspect.isfunction(value)}
    bare = {name for name, value in functions.items() if ">>> " not in (value.__doc__ or "")}
    breaches = [f"{name} has no doctest" for name in sorted(bare - NO_DOCTEST)]
    breaches += [f"NO_DOCTEST lists {name}, which has one now or is gone" for name in sorted(NO_DOCTEST - bare)]
    report("a public function shows a number worth seeing", breaches)


def test_every_public_name_appears_in_the_book():
    pages = [*(ROOT / "book").rglob("*.md"), *(ROOT / "notebooks").rglob("*.ipynb")]
    prose = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    # An API page lists all of a module's __all__, names it re-exports included.
    listed = set(re.findall(r"automodule:: (\S+)", prose))
    shown = {
        name for module, path in public_modules().items() if module in listed for name in declared_names(path) or ()
    }
    words = set(re.findall(r"\w+", prose))
    absent = [name for name, _ in own_public_objects() if name.rpartition(".")[2] not in shown | words]
    report("name it on a page of book/, or list its module on an API page", absent)


# --- tests that can fail


def called_name(node: ast.AST) -> str:
    """``torch.allclose(a, b)`` -> ``allclose``; an empty string for anything but a call of a name."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


def dropped_comparisons(tree: ast.Module) -> list[ast.Expr]:
    """Statements that compare and throw the answer away, outside ``with pytest.raises(...)``."""
    excused = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any(called_name(i.context_expr) in {"raises", "warns"} for i in node.items)
        for inner in ast.walk(node)
    }
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and node not in excused
        and (isinstance(node.value, ast.Compare) or called_name(node.value) in COMPARISONS)
    ]


def test_no_test_drops_a_comparison():
    breaches = [
        f"{where(path, node)}: {ast.unparse(node)[:80]}"
        for path in sources("tests")
        for node in dropped_comparisons(parse(path))
    ]
    report("assert it, or use torch.testing.assert_close", breaches)


@pytest.mark.parametrize(
    ("statement", "is_dropped"),
    [
        ("torch.allclose(a, b)", True),
        ("a.equal(b)", True),
        ("a == b", True),
        ("np.isclose(a, b)", True),
        ("assert torch.allclose(a, b)", False),
        ("same = a == b", False),
        ("torch.testing.assert_close(a, b)", False),
        ("with pytest.raises(TypeError):\n    a == b", False),
    ],
)
def test_comparison_rule_tells_dropped_from_used(statement, is_dropped):
    assert bool(dropped_comparisons(ast.parse(statement))) == is_dropped


def checks_something(function: ast.AST, helpers: dict[str, ast.AST], seen: frozenset[str] = frozenset()) -> bool:
    """Whether the body can fail: an assert, ``raises``, ``gradcheck``, ``assert_*``, or a helper that has one."""
    for node in ast.walk(function):
        name = called_name(node)
        if (
            isinstance(node, ast.Assert)
            or name.startswith(("assert", "check"))
            or name in {"raises", "fail", "gradcheck"}
        ):
            return True
        if name in helpers and name not in seen and checks_something(helpers[name], helpers, seen | {name}):
            return True
    return False


def test_every_test_checks_something():
    breaches = []
    for path in sources("tests"):
        functions = {n.name: n for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef)}
        breaches += [
            f"{where(path, node)}: {name}"
            for name, node in functions.items()
            if name.startswith("test_") and path.name.startswith("test_") and not checks_something(node, functions)
        ]
    report("a test asserts something", breaches)


# --- files


def test_no_file_names_a_place_on_one_machine():
    # Written apart, so that this file does not match itself.
    places = re.compile(
        r"(?<![\w.>])/(?:" + "|".join(["work", "home/" + r"\w", "root", "Users/" + r"\w"]) + r")(?:/|\b)|[A-Z]:\\Users"
    )
    breaches = [
        f"{where(path, number)}: {line.strip()[:100]}"
        for path in tracked()
        if (text := text_of(path)) is not None
        for number, line in enumerate(text.splitlines(), start=1)
        if places.search(line)
    ]
    report("no absolute path of anybody's machine", breaches)


def test_no_large_files():
    large = [
        f"{where(path, 1)}: {path.stat().st_size // 1000} kB" for path in tracked() if path.stat().st_size > 500_000
    ]
    report("files over 500 kB are made or downloaded, not tracked", large)


def test_notebooks_carry_no_outputs():
    breaches = []
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        for index, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell.get("outputs") or cell.get("execution_count") is not None:
                breaches.append(f"{where(path, 1)}: cell {index}")
    report("nbstripout --keep-id NOTEBOOK", breaches)


def test_nothing_is_left_for_later():
    # The words are written apart here, for this file is searched too.
    later = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"]) + r")\b")
    breaches = [
        f"{where(path, number)}: {line.strip()[:100]}"
        for path in sources("detcore", "tests", "tools")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if later.search(line)
    ]
    report("no stubs and no notes to self", breaches)
