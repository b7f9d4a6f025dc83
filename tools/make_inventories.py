"""Write the small inventories that let the book link to other projects' documentation without a network.

A page names ``torch.Tensor``; Sphinx looks the name up in ``book/_inv/torch.inv`` and links to the
real site. Names are added here when ``-n`` reports one: ``python tools/make_inventories.py``.
"""

import builtins
import zlib
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "book/_inv"

Row = tuple[str, str, str]  # name, role, address ($ stands for the name)


def python_rows() -> list[Row]:
    """The standard library, as far as signatures and docstrings name it."""
    functions, types = "library/functions.html#$", "library/stdtypes.html#$"
    rows = [
        (n, "py:class", functions) for n in ("bool", "float", "int", "object", "slice", "tuple", "type", "property")
    ]
    rows += [(n, "py:class", types) for n in ("str", "bytes", "dict", "list", "set", "frozenset", "range")]
    rows += [
        ("None", "py:data", "library/constants.html#None"),
        ("NotImplemented", "py:data", "library/constants.html#$"),
    ]
    rows += [
        (name, "py:exception", "library/exceptions.html#$")
        for name, value in sorted(vars(builtins).items())
        if isinstance(value, type) and issubclass(value, BaseException)
    ]
    abc = (
        "Callable",
        "Collection",
        "Generator",
        "Hashable",
        "Iterable",
        "Iterator",
        "Mapping",
        "MutableMapping",
        "Sequence",
        "Sized",
    )
    rows += [(f"collections.abc.{n}", "py:class", "library/collections.abc.html#$") for n in abc]
    typing = ("Any", "Callable", "ClassVar", "Final", "Literal", "Optional", "Union")
    rows += [(f"typing.{n}", "py:data", "library/typing.html#$") for n in typing]
    rows += [(f"typing.{n}", "py:class", "library/typing.html#$") for n in ("NamedTuple", "Protocol", "TypedDict")]
    rows += [
        ("pathlib.Path", "py:class", "library/pathlib.html#$"),
        ("functools.partial", "py:function", "library/functools.html#$"),
        ("dataclasses.dataclass", "py:function", "library/dataclasses.html#$"),
        ("contextlib.AbstractContextManager", "py:class", "library/contextlib.html#$"),
        ("os.PathLike", "py:class", "library/os.html#$"),
        ("io.BufferedIOBase", "py:class", "library/io.html#$"),
        ("argparse.Namespace", "py:class", "library/argparse.html#$"),
        ("random.Random", "py:class", "library/random.html#$"),
        ("types.MappingProxyType", "py:class", "library/types.html#$"),
    ]
    return rows


def torch_rows() -> list[Row]:
    """PyTorch."""
    own = "generated/$.html#$"
    rows = [
        ("torch.Tensor", "py:class", "tensors.html#$"),
        ("Tensor", "py:class", "tensors.html#torch.Tensor"),  # as jaxtyping writes it
        ("torch.Size", "py:class", "size.html#$"),
        ("torch.device", "py:class", "tensor_attributes.html#$"),
        ("torch.dtype", "py:class", "tensor_attributes.html#$"),
        ("torch.Generator", "py:class", own),
        ("torch.autocast", "py:class", "amp.html#$"),
        ("torch.utils.data.DataLoader", "py:class", "data.html#$"),
        ("torch.utils.data.Dataset", "py:class", "data.html#$"),
        ("torch.utils.data.Sampler", "py:class", "data.html#$"),
        ("torch.nn.parameter.Parameter", "py:class", own),
        ("torch.nn.modules.module.Module", "py:class", "generated/torch.nn.Module.html#torch.nn.Module"),
        ("torch.nn.modules.conv.Conv2d", "py:class", "generated/torch.nn.Conv2d.html#torch.nn.Conv2d"),
        ("torch.nn.Parameter", "py:class", "generated/torch.nn.parameter.Parameter.html#torch.nn.parameter.Parameter"),
        ("torch.optim.Optimizer", "py:class", "optim.html#$"),
        ("torch.optim.SGD", "py:class", own),
        ("torch.optim.AdamW", "py:class", own),
        ("torch.optim.lr_scheduler.LRScheduler", "py:class", own),
    ]
    modules = (
        "Module",
        "ModuleDict",
        "ModuleList",
        "Sequential",
        "Conv2d",
        "BatchNorm2d",
        "GroupNorm",
        "Identity",
        "ReLU",
    )
    rows += [(f"torch.nn.{n}", "py:class", own) for n in modules]
    functions = ("compile", "load", "save", "where", "topk", "manual_seed", "as_tensor", "zeros", "logit", "sigmoid")
    return rows + [(f"torch.{n}", "py:function", own) for n in functions]


def torchvision_rows() -> list[Row]:
    """Torchvision: tensors with a meaning, box operations, models the tests compare with."""
    rows = [
        (f"torchvision.tv_tensors.{n}", "py:class", "generated/$.html#$") for n in ("BoundingBoxes", "Image", "Mask")
    ]
    ops = ("batched_nms", "box_convert", "box_iou", "nms", "sigmoid_focal_loss")
    rows += [(f"torchvision.ops.{n}", "py:function", "generated/$.html#$") for n in ops]
    models = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssd300_vgg16")
    rows += [(f"torchvision.models.detection.{n}", "py:function", "models/generated/$.html#$") for n in models]
    page = "models/retinanet.html"
    rows += [("torchvision.models.detection.retinanet.RetinaNet", "py:class", page)]
    for name in ("Compose", "Transform"):
        rows.append((f"torchvision.transforms.v2.{name}", "py:class", "generated/$.html#$"))
    page = "generated/torchvision.transforms.v2.Transform.html"
    return [*rows, ("torchvision.transforms.v2._transform.Transform", "py:class", page)]


def numpy_rows() -> list[Row]:
    """NumPy."""
    array = "reference/generated/numpy.ndarray.html#numpy.ndarray"
    rows = [("numpy.ndarray", "py:class", array), ("ndarray", "py:class", array)]  # the second as jaxtyping writes it
    rows += [(n, "py:data", "reference/typing.html#$") for n in ("numpy.typing.ArrayLike", "numpy.typing.NDArray")]
    rows += [
        (f"numpy.{n}", "py:class", "reference/arrays.scalars.html#$")
        for n in ("float64", "float32", "int64", "uint8", "bool")
    ]
    return [*rows, ("numpy.random.Generator", "py:class", "reference/random/generator.html#$")]


def matplotlib_rows() -> list[Row]:
    """Matplotlib."""
    return [
        ("matplotlib.axes.Axes", "py:class", "api/_as_gen/$.html#$"),
        ("matplotlib.axes._axes.Axes", "py:class", "api/_as_gen/matplotlib.axes.Axes.html#matplotlib.axes.Axes"),
        ("matplotlib.figure.Figure", "py:class", "api/figure_api.html#$"),
        ("matplotlib.rc_context", "py:function", "api/matplotlib_configuration_api.html#$"),
    ]


def jaxtyping_rows() -> list[Row]:
    """Jaxtyping's element types."""
    names = ("Bool", "Float", "Float32", "Float64", "Int", "Int64", "Integer", "Num", "Real", "Shaped", "UInt8")
    return [(f"jaxtyping.{n}", "py:class", "api/array/") for n in names]


def inventory(project: str, rows: list[Row]) -> bytes:
    """One inventory file in Sphinx's format 2.

    Raises:
        ValueError: if a name is there twice.
    """
    names = [name for name, _, _ in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"inventory: rows must name each thing once; got twice {twice} in {project}.")
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: stable\n"
    head += "# The remainder of this file is compressed using zlib.\n"
    # Sphinx itself fills in a $ at the end of an address only
    body = "".join(f"{name} {role} 1 {address.replace('$', name)} -\n" for name, role, address in sorted(rows))
    return head.encode() + zlib.compress(body.encode(), 9)


INVENTORIES = {
    "python": python_rows,
    "torch": torch_rows,
    "torchvision": torchvision_rows,
    "numpy": numpy_rows,
    "matplotlib": matplotlib_rows,
    "jaxtyping": jaxtyping_rows,
}
"""File name -> what is in it; ``intersphinx_mapping`` in _config.yml lists the same names."""


def main() -> None:
    """Write them all."""
    FOLDER.mkdir(exist_ok=True)
    for name, rows in INVENTORIES.items():
        path = FOLDER / f"{name}.inv"
        path.write_bytes(inventory(name, rows()))
        print(f"{path.relative_to(FOLDER.parents[1])}: {len(rows())} names")


if __name__ == "__main__":
    main()
