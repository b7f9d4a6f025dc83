"""Measurements against other packages. Each module is a command: ``python -m benchmarks.torchvision --help``."""
