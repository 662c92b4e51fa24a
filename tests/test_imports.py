"""Which part may import which, and which may not be imported by whom; docs/architecture.md shows the same list."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "metagen_jax"

ARROWS = {
    "types": "",
    "files": "",
    "sharding": "types",
    "processes": "types sharding",
    "array_files": "files",
    "parameters": "types files array_files",
    "exporting": "types",
    "games": "types",
    "dynamics": "types games",
    "adapt": "types sharding games",
    "meta": "types sharding games dynamics adapt",
    "models": "types sharding games",
    "tasks": "types files",
    "metrics": "types",
    "evaluate": "types tasks metrics",
    "evaluate_shots": "types tasks metrics evaluate",
    "evaluate_labels": "types tasks evaluate",
    "critics": "types files tasks models",
    "evaluate_samples": "types tasks metrics critics evaluate",
    "train": "types sharding tasks adapt meta",
    "persistent": "types sharding tasks meta train",
    "budget": "types tasks meta train",
    "config": "files",
    "latent": "types games tasks models meta",
    "strategies": "types games tasks meta",
    "population": "types games tasks adapt models meta train",
    "build": "types config games dynamics tasks models adapt meta latent strategies train files parameters",
    "cost": "",
    "plan": "types config cost models adapt meta train build",
    "baselines": "types config tasks adapt meta metrics train build",
    "failed_saving": "",
    "checkpoint": "sharding parameters failed_saving train",
    "writing": "",
    "run_directory": "files config tasks build writing",
    "progress": "",
    "report": "",
    "report_latent": "report",
}
"""Each part of the package and the parts that it may import; `cli` may import them all."""

HEAVY = {
    "flax": {"models/networks.py"},
    "orbax": {"checkpoint.py"},
    "matplotlib": {"report.py", "report_latent.py"},
    "tqdm": {"progress.py"},
    "tyro": {"cli"},
    "scipy": {"metrics/interval.py"},
    "tensorflow_datasets": set(),
    "tensorflow": set(),
    "sklearn": set(),
    "PIL": set(),
    "tensorboardX": set(),
    "safetensors": set(),
    "flatbuffers": set(),
}
"""Optional or heavy packages, and the modules that may import them at module level."""


def _modules():
    return [path for path in sorted(PACKAGE.rglob("*.py"))]


def _part(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imported(tree):
    """Yield the full names of the modules that are imported anywhere in the tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction of an arrow"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _parts_imported(path):
    names = [name.split(".") for name in _imported(ast.parse(path.read_text(encoding="utf-8")))]
    return {name[1] for name in names if name[0] == "metagen_jax" and len(name) > 1} - {_part(path)}


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    part = _part(path)
    if part in ("__init__", "cli", "__main__"):
        return
    assert part in ARROWS, f"{part} is new: add it to ARROWS, and to the list and the layout in docs/architecture.md"
    more = _parts_imported(path) - set(ARROWS[part].split())
    assert not more, f"{path.name} imports {sorted(more)}, but {part} may import only: {ARROWS[part] or 'nothing'}"


def test_every_arrow_is_used_and_none_goes_round():
    used = {part: set() for part in ARROWS}
    for path in _modules():
        if _part(path) in ARROWS:
            used[_part(path)] |= _parts_imported(path)
    for part, allowed in ARROWS.items():
        unused = set(allowed.split()) - used[part] - {"types"}
        assert not unused, f"{part} no longer imports {sorted(unused)}: take the arrow away"
    reached = {part: set() for part in ARROWS}
    for _ in ARROWS:
        for part, allowed in ARROWS.items():
            reached[part] |= set(allowed.split()).union(*(reached[other] for other in allowed.split()))
    assert not [part for part in ARROWS if part in reached[part]]


def test_models_and_meta_never_import_each_other():
    for one, other in (("models", "meta"), ("meta", "models"), ("adapt", "models"), ("models", "adapt")):
        assert other not in ARROWS[one].split()
        for path in (PACKAGE / one).rglob("*.py"):
            assert other not in _parts_imported(path), path


def _imports_at_module_level(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in _imported(ast.Module([node], []))
    }


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_and_optional_packages_are_imported_only_where_they_belong(package):
    for path in _modules():
        name = path.relative_to(PACKAGE).as_posix()
        if package in _imports_at_module_level(path):
            assert name in HEAVY[package] or name.split("/")[0] in HEAVY[package], f"{name} imports {package}"


def test_flax_is_named_nowhere_but_in_networks():
    for path in _modules():
        names = {name.split(".")[0] for name in _imported(ast.parse(path.read_text(encoding="utf-8")))}
        assert "flax" not in names or path == PACKAGE / "models" / "networks.py"


def test_importing_the_package_loads_nothing_heavy():
    """orbax and optax bring packages of their own, so what is loaded is asked of a fresh interpreter."""
    unwanted = {"tensorflow_datasets", "tensorflow", "tyro", "tqdm", "matplotlib", "orbax.checkpoint", "sklearn"}
    code = (
        "import sys, flax, optax; had = set(sys.modules); import metagen_jax\n"
        f"print(sorted({unwanted} & (set(sys.modules) - had)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_architecture_shows_the_same_arrows():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"```arrows\n(.*?)```", text, re.DOTALL)
    assert block, "docs/architecture.md has no ```arrows block"
    shown = dict(re.findall(r"^(\w+) +<- *(.*?) *$", block[1], re.MULTILINE))
    assert shown == {part: allowed or "nothing" for part, allowed in ARROWS.items()} | {"cli": "all of these"}
