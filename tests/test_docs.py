"""The documentation runs, its links lead somewhere, and its picture of the code is the code."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import jax
import pytest

import metagen_jax as mg

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:metagen_jax|tests|docs|experiments|benchmarks)/[\w./-]+)`")


def _name(path):
    return path.name


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_python_in_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, request):
    text = page.read_text(encoding="utf-8")
    blocks = [match for match in CODE.finditer(text) if "no-run" not in match[1]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAGEN_CACHE_DIR", str(request.config.cache.mkdir("metagen")))
    namespace = {"__name__": "__main__"}
    with jax.numpy_rank_promotion("allow"):  # as a reader has it
        for match in blocks:
            before = text[: match.start(2)].count("\n")
            exec(compile("\n" * before + match[2], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_and_paths_in_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name}: {link} leads nowhere"
        assert path.is_relative_to(ROOT.resolve()), f"{page.name}: {link} leads out of the repository"
        if anchor:
            assert anchor in _anchors(path), f"{page.name}: {link}: {path.name} has no such heading"
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), f"{page.name} names {path}, which is not there"


def _anchors(path):
    headings = re.findall(r"^#+ +(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _block(kind):
    return re.search(rf"```{kind}\n(.*?)```", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def test_the_layout_lists_every_module_and_nothing_else():
    shown = [line.split()[0] for line in _block("layout").splitlines() if line.strip()]
    folders = tuple(entry for entry in shown if entry.endswith("/"))
    package = ROOT / "metagen_jax"
    missing = [entry for entry in shown if not (package / entry).exists()]
    assert not missing, f"docs/architecture.md shows {missing}, which are not there"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    unlisted = {module for module in modules if not module.startswith(folders)} - set(shown)
    assert not unlisted, f"add {sorted(unlisted)} to the layout in docs/architecture.md"


SIGNATURES = [line.split("  #")[0].strip() for line in _block("signatures").splitlines() if line.strip()]


@pytest.mark.parametrize("line", SIGNATURES)
def test_a_signature_in_the_architecture_is_that_of_the_code(line):
    path, _, arguments = line.partition("(")
    module, _, name = path.rpartition(".")
    thing = getattr(importlib.import_module(f"metagen_jax.{module}") if module else mg, name)
    if hasattr(thing, "_fields"):
        assert arguments.rstrip(")").split(", ") == list(thing._fields)
        return
    shown = ast.parse(f"def {name}({arguments}: ...").body[0].args
    code = inspect.signature(thing).parameters.values()
    positional = [p for p in code if p.kind == p.POSITIONAL_OR_KEYWORD]
    keyword = [p for p in code if p.kind == p.KEYWORD_ONLY]
    assert [argument.arg for argument in shown.args] == [p.name for p in positional]
    assert [argument.arg for argument in shown.kwonlyargs] == [p.name for p in keyword]
    assert (shown.kwarg is not None) == any(p.kind == p.VAR_KEYWORD for p in code)
    given = [None] * (len(shown.args) - len(shown.defaults)) + shown.defaults + shown.kw_defaults
    for node, parameter in zip(given, positional + keyword, strict=True):
        assert (node is None) == (parameter.default is parameter.empty), parameter.name
        if node is not None and ast.unparse(node) != "...":  # "...": a default without a short form
            assert ast.literal_eval(node) == parameter.default, parameter.name


def test_every_learner_start_and_field_of_the_package_is_in_the_architecture():
    shown = {line.partition("(")[0] for line in SIGNATURES}
    functions = {name for name in mg.__all__ if inspect.isfunction(getattr(mg, name))}
    assert functions <= shown, f"add {sorted(functions - shown)} to the signatures in docs/architecture.md"
