"""The public names: complete, documented, and consistent with each other."""

import ast
import inspect
import sys
from pathlib import Path

import pytest

import spherical_optax as so

FUNCTIONS = [name for name in so.__all__ if inspect.isfunction(getattr(so, name))]
PAIRS = {
    "adam_s": "scale_by_adam_s",
    "adam_srt": "scale_by_adam_srt",
    "adam_g": "scale_by_adam_g",
}


def test_all_is_sorted_and_complete():
    assert list(so.__all__) == sorted(so.__all__)
    public = {
        name
        for name, value in vars(so).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(so.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_documented(name):
    function = getattr(so, name)
    doc = inspect.getdoc(function)
    assert ">>> " in doc and "Returns:" in doc
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}: " in doc.split("Args:")[1], parameter


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_typed(name):
    signature = inspect.signature(getattr(so, name))
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter


@pytest.mark.parametrize("name", FUNCTIONS)
def test_channel_axes_is_required_and_named(name):
    parameters = inspect.signature(getattr(so, name)).parameters
    if "channel_axes" in parameters and name not in ("path_mask", "path_labels", "describe"):
        assert parameters["channel_axes"].kind is inspect.Parameter.KEYWORD_ONLY
        if name == "blocks":  # whose other axes may be none
            return
        assert parameters["channel_axes"].default is inspect.Parameter.empty


@pytest.mark.parametrize("name", PAIRS)
def test_an_optimizer_and_its_link_share_their_defaults(name):
    optimizer = inspect.signature(getattr(so, name)).parameters
    link = inspect.signature(getattr(so, PAIRS[name])).parameters
    shared = set(optimizer) & set(link)
    assert {"b1", "b2", "eps", "channel_axes", "mu_dtype"} <= shared
    for parameter in shared:
        assert optimizer[parameter] == link[parameter]


def test_the_library_imports_jax_and_optax_only():
    allowed = {"jax", "optax", "spherical_optax"}
    for file in Path(so.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for module in (name.split(".")[0] for name in names):
                assert module in allowed | sys.stdlib_module_names, (file, module)
