"""The top-level folders refuse an import under a second name, which would duplicate every class."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["models", "inference"])
def test_bare_import_is_refused(folder: str) -> None:
    spec = importlib.util.spec_from_file_location(folder, ROOT / folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match=rf"not as {folder}\. Write: from deepprob\.{folder} import"):
        spec.loader.exec_module(module)


@pytest.mark.parametrize("folder", ["models", "inference"])
def test_package_import_loads_the_top_level_folder(folder: str) -> None:
    module = importlib.import_module(f"deepprob.{folder}")
    assert Path(str(module.__file__)).samefile(ROOT / folder / "__init__.py")
