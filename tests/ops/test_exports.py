"""Every public function of the package is exported and documented."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from tropism import ops


def test_every_public_function_is_exported_and_documented() -> None:
    names = set()
    for module in pkgutil.iter_modules(ops.__path__, prefix="tropism.ops."):
        if module.name == "tropism.ops.arguments":  # checks that only this package uses
            continue
        for name, function in inspect.getmembers(importlib.import_module(module.name), inspect.isfunction):
            if function.__module__ == module.name and not name.startswith("_"):
                names.add(name)
                for section in ("Args:", "Returns:", "Raises:"):
                    assert section in (function.__doc__ or ""), f"the docstring of {name} has no {section}"
    assert {name for name in ops.__all__ if name.islower()} == names
    assert ops.__all__ == sorted(ops.__all__)
