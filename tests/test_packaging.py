"""pyproject.toml, environment.yml, README.md and Colab agree; a command that cannot run says so in a sentence."""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def runtime() -> dict[str, Requirement]:
    """The runtime requirements by name."""
    return {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}


def colab() -> dict[str, Version]:
    """The packages in the Colab image that matter here."""
    lines = (ROOT / "tests" / "colab_freeze.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def load_tool(name):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- one list of requirements, written in three places


def test_requirements_have_a_lower_bound_and_no_upper_bound():
    for name, requirement in runtime().items():
        operators = [specifier.operator for specifier in requirement.specifier]
        assert operators == [">="], f"{name} must have one bound, >=; got {requirement}"


def test_environment_yml_lists_the_requirements_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip[:-1] == PROJECT["dependencies"]
    assert pip[-1] == "-e .[test,book]"
    assert set(re.findall(r"\w+", pip[-1].partition("[")[2])) <= set(PROJECT["optional-dependencies"])
    assert f"python{PROJECT['requires-python']}" in environment["dependencies"]


def test_readme_lists_the_requirements_of_pyproject():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [line] = [line for line in readme.splitlines() if line.startswith("Requirements: ")]
    listed = re.findall(r"`([^`]+)`", line)
    assert listed == [f"python{PROJECT['requires-python']}", *PROJECT["dependencies"]]


def test_every_import_of_the_package_is_a_requirement():
    # What a module imports at its top must be there after `pip install .`; what a function imports may be optional.
    installed_as = {"PIL": "pillow"}
    missing = []
    for path in sorted((ROOT / "detcore").rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            match = re.match(r"(?:import|from) (\w+)", line)
            name = match[1] if match else None
            if name is None or name == "detcore" or name in sys.stdlib_module_names:
                continue
            if canonicalize_name(installed_as.get(name, name)) not in runtime():
                missing.append(f"{path.relative_to(ROOT)}:{number}: {line}")
    assert not missing, "imported at the top of a module but not in [project] dependencies:\n" + "\n".join(missing)


# --- Colab: installing detcore there changes nothing that is there


def test_colab_satisfies_every_requirement_that_it_has():
    image = colab()
    unmet = [
        f"{requirement} but Colab has {image[name]}"
        for name, requirement in runtime().items()
        if name in image and not requirement.specifier.contains(image[name], prereleases=True)
    ]
    assert not unmet


def test_what_colab_lacks_pulls_in_nothing_that_changes_it():
    image = colab()
    todo = [name for name in runtime() if name not in image]
    assert set(todo) == {"jaxtyping", "tyro"}, (
        "a new package that Colab lacks: look at what it needs, then list it here"
    )
    seen = set()
    while todo:
        name = todo.pop()
        seen.add(name)
        for requirement in map(Requirement, metadata.requires(name) or []):
            needed = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate({"python_version": "3.12", "extra": ""}):
                continue
            if needed in image:
                assert requirement.specifier.contains(image[needed], prereleases=True), f"{name} needs {requirement}"
            elif needed not in seen:
                todo.append(needed)
    # Colab has none of these; a longer list means that the freeze file lacks a line.
    assert seen == {"jaxtyping", "tyro", "wadler-lindig"}


# --- the installed package


def test_installed_package_is_this_one():
    assert metadata.version("detcore") == PROJECT["version"]
    [command] = metadata.entry_points(group="console_scripts", name="detcore")
    assert command.value == "detcore.cli:main"
    assert callable(command.load())


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    import detcore

    assert detcore.__version__ == PROJECT["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", changelog, re.MULTILINE)[0] == "Unreleased"


@pytest.mark.slow
def test_wheel_holds_the_whole_package_and_nothing_else(tmp_path):
    # Built from a copy: setuptools leaves a build folder beside the sources.
    source = tmp_path / "source"
    shutil.copytree(ROOT / "detcore", source / "detcore", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "notebooks").mkdir()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=300)
    [wheel] = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "wheel", format="zip")
    inside = {p.relative_to(tmp_path / "wheel").as_posix() for p in (tmp_path / "wheel").rglob("*") if p.is_file()}
    code = {p.relative_to(source).as_posix() for p in (source / "detcore").rglob("*.py")}
    assert code | {"detcore/py.typed"} == {name for name in inside if ".dist-info/" not in name}


# --- the commands


def test_ruff_is_pinned_to_one_version():
    [pinned] = [Requirement(r) for r in PROJECT["optional-dependencies"]["test"] if Requirement(r).name == "ruff"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    [hook] = [repo for repo in hooks if repo["repo"].endswith("/ruff-pre-commit")]
    assert str(pinned.specifier) == f"=={hook['rev'].removeprefix('v')}"


@pytest.mark.parametrize(
    ("version", "has_ensurepip", "message"),
    [
        ((3, 10, 4), True, r"Python must be 3\.11 or newer; got 3\.10 \(/usr/bin/python3\)\. .*PYTHON="),
        ((3, 11, 0), False, r"no ensurepip\. .*apt install python3-venv"),
    ],
)
def test_make_venv_names_the_cure(version, has_ensurepip, message):
    assert re.search(message, load_tool("make_venv").complaint(version, has_ensurepip, "/usr/bin/python3"))


def test_make_venv_accepts_a_python_that_is_new_enough():
    assert load_tool("make_venv").complaint((3, 11, 0), True) == ""


def test_make_venv_leaves_a_folder_of_other_files_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    script = [sys.executable, str(ROOT / "tools" / "make_venv.py"), str(tmp_path)]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "VENV must be a new folder or a virtual environment" in run.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_readme_and_ci_name_make_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split())
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8")
        used = set(re.findall(r"(?:^|`|')make ([a-z][a-z-]+)", text, re.MULTILINE))
        assert used <= targets, f"{name} names make targets that do not exist: {sorted(used - targets)}"
    run = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "make test" in run.stdout
    assert "make book" in run.stdout


def test_ci_runs_both_commands_literally():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    commands = [line.split("' ", 1)[1] for line in lines if line.startswith("phase '")]
    assert commands == ["make test", "make book", "make test-book"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100, ".ci/run must be executable"


def test_readme_example_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert all(loss.isfinite() for loss in names["losses"].values())
    promised = re.search(r"a dict a picture: (.+)", example)[1].split(", ")
    assert [set(detection) for detection in names["detections"]] == [set(promised)] * 2
