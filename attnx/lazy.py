"""Exports that are imported when they are first asked for, so that ``import attnx`` stays quick however many mechanisms there are."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence


def attach(package: str, modules: Mapping[str, Sequence[str]], submodules: Sequence[str] = ()) -> tuple[Callable, Callable]:
    """``__getattr__`` and ``__dir__`` of a package that exports names of its modules.

    Args:
      package: its ``__name__``.
      modules: ``{module: names}``. No name may be that of a module, which Python would put in its place.
      submodules: modules and packages inside that are exported themselves.

    >>> import attnx
    >>> attnx.scores.forgetting_attention.__module__
    'attnx.scores.forgetting_transformer'
    """
    home = {name: module for module, names in modules.items() for name in names}

    def find(name):
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return find, lambda: sorted({*vars(sys.modules[package]), *home, *submodules})
