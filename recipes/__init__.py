"""One file a claimed result: the command that made it, on what, in how long. ``python -m recipes.NAME``."""
