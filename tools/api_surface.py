"""The public names of detcore, read from every module's ``__all__`` without importing anything.

``python tools/api_surface.py`` rewrites tests/api_surface.txt; tests/test_house.py compares. Adding or removing
a public name is thus a line in a commit, seen by whoever reviews it.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
SURFACE = ROOT / "tests" / "api_surface.txt"


def module_name(path: pathlib.Path, root: pathlib.Path) -> str:
    """The dotted name of the module in ``path``, seen from ``root``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def public_modules(root: pathlib.Path = ROOT) -> dict[str, pathlib.Path]:
    """Every module below ``root``/detcore without a leading underscore in its name, sorted."""
    paths = {module_name(path, root): path for path in (root / "detcore").rglob("*.py")}
    return {name: paths[name] for name in sorted(paths) if not any(part.startswith("_") for part in name.split("."))}


def declared_names(path: pathlib.Path) -> list[str] | None:
    """The strings of the module's ``__all__``, in its order; ``None`` if it has none.

    Raises:
        ValueError: if ``__all__`` is not a plain list or tuple of strings.
    """
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign):
            targets, value = [node.target], node.value
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            try:
                return [str(name) for name in ast.literal_eval(value)]
            except ValueError:
                raise ValueError(f"{path}:{node.lineno}: __all__ must be a plain list of strings") from None
    return None


def surface(root: pathlib.Path = ROOT) -> list[str]:
    """Every public name as ``module.name``, sorted."""
    return sorted(
        f"{module}.{name}" for module, path in public_modules(root).items() for name in declared_names(path) or []
    )


if __name__ == "__main__":
    names = surface()
    SURFACE.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    print(f"{SURFACE.relative_to(ROOT)}: {len(names)} public names")
