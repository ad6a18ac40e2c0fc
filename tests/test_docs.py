"""The documents say what is true: every module is named, every path exists, the README's code runs."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "gateway", "vision_service", "llm_service", "internvl_client", "deploy")
DOCUMENTS = [ROOT / "README.md", ROOT / "protos/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_architecture_names_every_module_and_no_other() -> None:
    modules = {named(path) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    described = set(re.findall(r"^\| `([\w/]+\.py)`", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE))
    assert described == {module for module in modules if not module.endswith("__init__.py")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    readme = (ROOT / "README.md").read_text()
    targets = re.findall(r"`make ([a-z]+)", readme) + re.findall(r"^make ([a-z]+) +#", readme, re.MULTILINE)
    assert {"demo", "test", "lint", "protos"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_dependency_has_its_reason() -> None:
    reasons = (ROOT / "docs/decisions/0001-dependencies.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    declared = {re.split(r"[\[<>=]", requirement)[0] for requirement in requirements}
    for name in declared - {"internvl-serving"}:
        assert name in reasons or name.startswith("types-"), f"{name}: say in docs/decisions why it is needed"


def test_nothing_speaks_of_what_a_reader_cannot_know() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    this = named(Path(__file__))
    pattern = re.compile(r"\b(issue #?\d+|\.\./shared/|/work/)", re.IGNORECASE)
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".proto", ".toml", ".yaml", "") and name != this and path.is_file():
            found = pattern.search(path.read_text(errors="replace"))
            assert not found, f"{name}: {found}"
