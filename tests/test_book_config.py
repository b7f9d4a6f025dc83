"""The book's files agree with each other and with the package, as far as that can be told without building it."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
SPHINX = CONFIG["sphinx"]["config"]
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
CHAPTERS = [
    entry["file"] for part in TOC["parts"] for top in part["chapters"] for entry in (top, *top.get("sections", ()))
]
BIBLIOGRAPHY = (ROOT / "book/references.bib").read_text(encoding="utf-8")
KEYS = re.findall(r"^@\w+\{([^,]+),", BIBLIOGRAPHY, re.MULTILINE)


def module_from(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_text(name: str) -> str:
    """The words of a page or notebook."""
    path = ROOT / name
    if path.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
    return path.read_text(encoding="utf-8")


def written() -> list[str]:
    return [p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("book/**/*.md"), *ROOT.glob("notebooks/*.ipynb")]]


# --- what YAML says ---------------------------------------------------------------------------------------------


def test_every_page_is_in_the_table_of_contents():
    listed = {TOC["root"], *CHAPTERS}
    assert len(CHAPTERS) == len(set(CHAPTERS))
    assert {Path(name).with_suffix("").as_posix() for name in written()} <= listed


def test_a_failing_cell_fails_the_build():
    execute = CONFIG["execute"]
    # allow_errors alone lets a build with a failed cell end well; stderr in a page is debris
    assert (execute["raise_on_error"], execute["allow_errors"], execute["stderr_output"]) == (True, False, "error")
    assert "nb_execution_cache_path" not in SPHINX  # else the extension's key is not used


def test_nothing_in_the_configuration_is_fetched_by_a_page():
    assert not outside(SPHINX["mathjax_path"])
    assert CONFIG["launch_buttons"]["thebe"] is False
    assert not any(outside(f) for f in SPHINX["html_css_files"])


def outside(address: str) -> bool:
    return re.match(r"([a-z]+:)?//", address) is not None


def test_one_address_of_the_repository_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    url = CONFIG["repository"]["url"]
    assert project["urls"]["Homepage"] == url
    owner = url.removeprefix("https://github.com/")
    for name in written():
        for found in re.findall(
            r"(?:colab\.research\.google\.com/github|git\+https://github\.com)/([\w.-]+/[\w.-]+)", page_text(name)
        ):
            assert found == owner, name


def test_files_that_the_configuration_names_are_there():
    named = [CONFIG["logo"], CONFIG["html"]["favicon"], *CONFIG["bibtex_bibfiles"]]
    named += [f"book/_static/{f}" for f in SPHINX["html_css_files"]]
    named += [inventory for _, inventory in SPHINX["intersphinx_mapping"].values()]
    assert [name for name in named if not (ROOT / name).is_file()] == []


# --- references -------------------------------------------------------------------------------------------------


def test_references_are_each_there_once():
    assert KEYS
    assert len(KEYS) == len(set(KEYS))
    # braces that do not close would swallow the entries that follow
    assert BIBLIOGRAPHY.count("{") == BIBLIOGRAPHY.count("}")


def test_citations_are_in_the_references():
    cited = {
        (name, key.strip())
        for name in written()
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", page_text(name))
        for key in keys.split(",")
    }
    assert cited
    assert [(name, key) for name, key in sorted(cited) if key not in KEYS] == []


# --- API page ---------------------------------------------------------------------------------------------------


def declared(path: Path) -> list[str] | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return None


def test_api_pages_list_every_public_module_once():
    listed = re.findall(r"^\.\. automodule:: (\S+)$", "\n".join(map(page_text, written())), re.MULTILINE)
    assert len(listed) == len(set(listed))
    public = {}
    for path in sorted((ROOT / "detcore").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if declared(path) and path.name != "__init__.py" and not any(part.startswith("_") for part in parts):
            public[".".join(parts)] = path
    assert sorted(set(public) - set(listed)) == []
    gone = [
        name for name in listed if name not in public and not (ROOT / name.replace(".", "/") / "__init__.py").is_file()
    ]
    assert gone == []


# --- the extension ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extension():
    pytest.importorskip("sphinx", reason="needs the book's tools: pip install detcore[book]")
    return module_from("book/_ext/detcore_book.py")


def test_execution_key_changes_with_all_that_notebooks_read(extension, tmp_path):
    for name in ("detcore/boxes.py", "detcore/nn/heads.py", "results/scenes.json", "environment.yml", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    key = extension.execution_key(tmp_path)
    assert extension.execution_key(tmp_path) == key
    for name in ("detcore/boxes.py", "detcore/nn/heads.py", "results/scenes.json", "environment.yml"):
        (tmp_path / name).write_text("2")
        assert extension.execution_key(tmp_path) != key, name
        (tmp_path / name).write_text("1")
    (tmp_path / "README.md").write_text("2")
    (tmp_path / "detcore/__pycache__").mkdir()
    (tmp_path / "detcore/__pycache__/boxes.py").write_text("2")
    assert extension.execution_key(tmp_path) == key
    (tmp_path / "detcore/boxes.py").rename(tmp_path / "detcore/moved.py")
    assert extension.execution_key(tmp_path) != key


class Script:
    def __init__(self, filename, body=""):
        self.filename, self.attributes = filename, {"body": body}


def test_drop_scripts_keeps_order_and_drops_thebe_and_doubles(extension):
    inline = Script(None, "const a = 1")
    scripts = [Script("doctools.js"), inline, Script("sphinx-thebe.js"), Script(None, "const THEBE_JS_URL = 2"), inline]
    context = {"script_files": scripts, "css_files": [Script("book.css"), Script("sphinx-thebe.css")]}
    kept = context["script_files"]
    extension.drop_scripts(None, "page", "page.html", context, None)
    assert [s.filename or s.attributes["body"] for s in kept] == ["doctools.js", "const a = 1"]
    assert [c.filename for c in context["css_files"]] == ["book.css"]


@pytest.mark.parametrize(
    ("what", "before", "after"),
    [
        ("property", ["At least 1: the normaliser."], ["..", "", "At least 1: the normaliser."]),
        ("property", ["No colon."], ["No colon."]),
        ("function", ["A: b."], ["A: b."]),
        ("function", ["Returns:", "    Two masks: a, b."], ["Returns:", "    \\", "    Two masks: a, b."]),
        ("function", ["Returns:", "    Two masks."], ["Returns:", "    Two masks."]),
        ("module", ["Boxes."], [".. rubric:: detcore.x", "   :class: api-module", "", "Boxes."]),
    ],
)
def test_shape_docstring(extension, what, before, after):
    lines = list(before)
    extension.shape_docstring(None, what, "detcore.x", None, None, lines)
    assert lines == after


@pytest.mark.parametrize(
    ("imported", "home"),
    [
        ("detcore.explore.slider", "detcore.explore.controls.slider"),
        ("detcore.explore.Control.texts", "detcore.explore.controls.Control.texts"),
        ("detcore.explore.PALETTE", None),
        ("detcore.explore.absent", None),
        ("detcore.absent.thing", None),
    ],
)
def test_home_follows_an_import(extension, imported, home):
    assert extension.home(imported) == home


# --- inventories --------------------------------------------------------------------------------------------------


def unpacked(data: bytes) -> tuple[bytes, list[str]]:
    lines = data.split(b"\n", 4)
    return lines[0], zlib.decompress(lines[4]).decode().splitlines()


def test_inventories_are_what_the_tool_writes():
    tool = module_from("tools/make_inventories.py")
    assert set(tool.INVENTORIES) == set(SPHINX["intersphinx_mapping"])
    for name, rows in tool.INVENTORIES.items():
        stored = unpacked((ROOT / f"book/_inv/{name}.inv").read_bytes())
        fresh = unpacked(tool.inventory(name, rows()))
        assert stored[0] == b"# Sphinx inventory version 2"
        # builtins differ between Python versions: what is stored must be there, what is new may be missing
        missing = set(stored[1]) - set(fresh[1])
        assert not missing or name == "python", missing


def test_inventory_rejects_a_name_given_twice():
    tool = module_from("tools/make_inventories.py")
    with pytest.raises(ValueError, match=r"inventory: rows must name each thing once; got twice \['a'\] in x"):
        tool.inventory("x", [("a", "py:class", "p"), ("a", "py:function", "q")])


def test_sphinx_reads_the_inventories():
    sphinx = pytest.importorskip("sphinx.util.inventory", reason="needs the book's tools: pip install detcore[book]")
    with (ROOT / "book/_inv/torch.inv").open("rb") as file:
        found = sphinx.InventoryFile.load(file, "https://example.org", lambda base, rest: f"{base}/{rest}")
    _, _, address, _ = found["py:class"]["torch.nn.Module"]
    assert address == "https://example.org/generated/torch.nn.Module.html#torch.nn.Module"


def test_importing_the_extension_starts_nothing():
    pytest.importorskip("sphinx", reason="needs the book's tools: pip install detcore[book]")
    # DETCORE_STATIC is set when Sphinx loads the extension, not when a test imports it
    code = (
        "import os, sys; sys.path.insert(0, 'book/_ext'); import detcore_book; print(os.environ.get('DETCORE_STATIC'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
