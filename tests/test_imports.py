"""Imports point one way: trajectory <- functional <- rest of modules <- callbacks, datamodules <- commands <- train."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = ("modules", "callbacks", "datamodules", "commands", "train", "tests")
ALLOWED = {  # of our own packages; the first prefix that fits a file counts
    "modules/trajectory.py": (),
    "modules/functional": ("modules.trajectory", "modules.functional"),
    "modules": ("modules",),
    "datamodules": ("modules", "datamodules"),
    "callbacks": ("modules", "callbacks"),
    "commands": ("modules", "datamodules", "callbacks", "commands"),
    "train.py": ("commands", "train"),
}
PACKAGES = ("modules", "datamodules", "callbacks", "commands")
FILES = [*sorted(p.relative_to(ROOT).as_posix() for top in PACKAGES for p in (ROOT / top).rglob("*.py")), "train.py"]


def imported(file: str) -> set[str]:
    """Everything that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file: str) -> None:
    allowed = next(value for prefix, value in ALLOWED.items() if file.startswith(prefix))
    ours = {name for name in imported(file) if name.split(".")[0] in OWN}
    astray = sorted(n for n in ours if not any(n == a or n.startswith(a + ".") for a in allowed))
    assert not astray


def test_only_the_crop_layer_imports_kornia_and_the_functional_core_only_torch() -> None:
    assert [f for f in FILES if any(n.split(".")[0] == "kornia" for n in imported(f))] == ["modules/crop.py"]
    for file in (f for f in FILES if f.startswith("modules/functional")):
        outside = {n.split(".")[0] for n in imported(file)} - {"modules", "torch"}
        assert outside <= set(__import__("sys").stdlib_module_names), file
