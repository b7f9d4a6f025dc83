"""The package's own source in a page."""

import ast
import inspect
import re
import textwrap
from typing import Any

__all__ = ["source"]


def source(obj: Any, *, docstring: bool = True) -> None:
    """Show the source of a function or class of the package, highlighted, so that no page holds a second copy.

    Args:
        obj: a function, method or class.
        docstring: false leaves the docstrings out; comments stay.

    Raises:
        TypeError: if ``obj`` has no Python source of its own.

    Example:
        >>> from detcore.explore import is_static
        >>> source(is_static)
        <IPython.core.display.Markdown object>
    """
    try:
        inner = inspect.unwrap(obj)
        code = textwrap.dedent(inspect.getsource(inner))
    except (TypeError, OSError):
        raise TypeError(
            f"source: obj must be a function or class written in Python; got {obj!r}. "
            "Of a functools.partial, give its func."
        ) from None
    if not docstring:
        code = _without_docstrings(code)
    file = inner.__module__.replace(".", "/")
    where = f"*{inner.__qualname__}* in `{file}.py`"
    from IPython.display import Markdown, display

    display(Markdown(f"{where}\n\n```python\n{code.rstrip()}\n```"))


def _without_docstrings(code: str) -> str:
    lines: list[str | None] = [*code.splitlines()]
    for node in ast.walk(ast.parse(code)):
        if (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and ast.get_docstring(node) is not None
        ):
            text = node.body[0]
            indent = " " * text.col_offset
            # a body of nothing but its docstring still needs a statement
            first, last = text.lineno - 1, text.end_lineno or text.lineno
            lines[first:last] = [None] * (last - first)
            lines[first] = indent + "..." if len(node.body) == 1 else None
    kept = [line for line in lines if line is not None]
    return re.sub(r":\n\n+", ":\n", "\n".join(kept))
