"""What the book's build needs and _config.yml cannot say."""

import hashlib
import importlib
import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment

MATHJAX = ("tex-chtml.js", "output/chtml/fonts/woff-v2")
"""What the pages load of sphinx-mathjax-offline: 1.6 of its 23 MB, so it is not loaded as an extension itself."""

EXECUTION_INPUTS = ("environment.yml", "detcore/**/*.py", "results/**/*")
"""What notebooks read besides their own cells. jupyter-cache compares the cells alone: after a change
here it would show the old outputs."""


def execution_key(root: Path) -> str:
    """A name for the state of all files that notebooks read."""
    digest = hashlib.sha256()
    for pattern in EXECUTION_INPUTS:
        for path in sorted(root.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def place_cache(app: Sphinx, config: Config) -> None:
    """Keep outputs for as long as nothing they came from has changed."""
    if not config.nb_execution_cache_path:
        cache = Path(app.outdir).parent / ".jupyter_cache" / execution_key(Path(app.srcdir))
        config.nb_execution_cache_path = str(cache)


def execute_side_by_side(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Fill the cache on all processors; MyST-NB executes what is not in it, one notebook after the other.

    A notebook that fails is left to MyST-NB too, which says what is wrong and ends the build.
    """
    if app.config.nb_execution_mode != "cache":
        return
    cache = get_cache(app.config.nb_execution_cache_path)
    paths = [str(env.doc2path(name)) for name in docnames]
    notebooks = [cache.add_nb_to_project(path).uri for path in paths if path.endswith(".ipynb")]
    if len(cache.list_unexecuted(notebooks)) < 2:
        return
    logger = logging.getLogger("jupyter_cache")
    logger.setLevel(logging.INFO)  # says which notebook starts and ends; left unset it tells all about processes
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # a kernel a processor: with more threads they would wait for each other
    try:
        executor = load_executor("local-parallel", cache, logger)
        executor.run_and_cache(filter_uris=notebooks, timeout=app.config.nb_execution_timeout)
    finally:
        os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)


def vendor_mathjax(app: Sphinx) -> None:
    """Copy MathJax from the installed package beside the pages, so that they need no network and git holds no copy."""
    if app.builder.format != "html":
        return
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "detcore_book: the package sphinx-mathjax-offline must be installed; got none. pip install detcore[book]."
        )
    package = Path(next(iter(spec.submodule_search_locations))) / "static/mathjax"
    top = Path(app.outdir).parent / "_vendor"
    for name in MATHJAX:
        source, target = package / name, top / "vendor/mathjax" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
    app.config.html_static_path.append(str(top))


def drop_scripts(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Leave thebe out, and what Sphinx 7.4 adds twice: a second declaration of the same name is a console error."""
    seen, kept = set(), []
    for script in context.get("script_files", []):
        body = (getattr(script, "attributes", None) or {}).get("body") or ""
        name = str(getattr(script, "filename", script) or "")
        if "thebe" in name or "THEBE_JS_URL" in body or (not name and body in seen):
            continue
        seen.add(body)
        kept.append(script)
    context["script_files"][:] = kept
    context["css_files"][:] = [css for css in context.get("css_files", []) if "thebe" not in str(css.filename)]


def shape_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Head each module of the API page with its name; keep napoleon from taking words before a colon for a type."""
    if what == "module":
        lines[:0] = [f".. rubric:: {name}", "   :class: api-module", ""]
    elif what in ("attribute", "data", "property") and lines and ":" in lines[0]:
        lines[:0] = ["..", ""]  # an empty comment comes first, and has no colon
    for i in reversed(range(len(lines) - 1)):
        if lines[i].strip() in ("Returns:", "Yields:") and ":" in lines[i + 1]:
            indent = lines[i + 1][: -len(lines[i + 1].lstrip())]
            lines.insert(i + 1, indent + "\\")  # an escaped line end: prints nothing, has no colon


def skip_visitors(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Document a thing in the public module that defines it and nowhere else, however many import it."""
    here = app.env.temp_data.get("autodoc:module")
    there = getattr(obj, "__module__", None)
    if what != "module" or not isinstance(there, str) or not there.startswith("detcore.") or "._" in there:
        return None
    return True if there != here else None


def follow_import(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """Find what a page or docstring names as it is imported, or by its bare name if only one thing has it.

    ``detcore.losses.focal_term`` is documented as ``detcore.losses.terms.focal_term``; both links work. What a
    private module defines is documented where it is exported, so that is looked for by its bare name too.
    """
    if node.get("refdomain") != "py":
        return None
    target = node.get("reftarget", "")
    domain = env.get_domain("py")
    if "." not in target or (target.startswith("detcore.") and "._" in target):
        things = [name for name, entry in domain.objects.items() if entry.objtype != "module"]
        bare = target.rpartition(".")[2]
        named = [name for name in things if name.startswith("detcore.") and name.rpartition(".")[2] == bare]
        real = named[0] if len(named) == 1 else None
    else:
        real = home(target) if target.startswith("detcore.") else None
    if real is None or real == target:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], real, node, content)


def home(name: str) -> str | None:
    """Where the thing imported as ``name`` is defined; ``None`` for what does not know (a constant, a module)."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner = getattr(importlib.import_module(".".join(parts[:cut])), parts[cut])
            return ".".join([owner.__module__, owner.__qualname__, *parts[cut + 1 :]])
        except ModuleNotFoundError:
            continue
        except AttributeError:
            return None
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the above. Kernels inherit the variable, so no notebook can forget that it runs for a page."""
    os.environ["DETCORE_STATIC"] = "1"
    app.connect("config-inited", place_cache)
    app.connect("builder-inited", vendor_mathjax)
    app.connect("env-before-read-docs", execute_side_by_side)
    app.connect("autodoc-process-docstring", shape_docstring, priority=100)  # napoleon comes at 500
    app.connect("autodoc-skip-member", skip_visitors)
    app.connect("missing-reference", follow_import)
    app.connect("html-page-context", drop_scripts, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
