"""What a clone has is what there is here: no module is left out by an ignore rule."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_module_of_the_package_is_tracked():
    listed = subprocess.run(["git", "ls-files", "metagen_jax"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    ignored = subprocess.run(
        ["git", "check-ignore", *(str(path) for path in (ROOT / "metagen_jax").rglob("*.py"))],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ignored.stdout == ""
