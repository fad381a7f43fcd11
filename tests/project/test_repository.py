"""The files around the code: workflows, forms, the citation, and the packages that a release uploads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import protopush
from docs_blocks import ROOT, blocks

SCHEMAS = {
    ".github/workflows/*.yml": "vendor.github-workflows",
    ".github/dependabot.yml": "vendor.dependabot",
    ".github/ISSUE_TEMPLATE/config.yml": "vendor.github-issue-config",
    ".github/ISSUE_TEMPLATE/[bf]*.yml": "vendor.github-issue-forms",
    "CITATION.cff": "vendor.citation-file-format",
}
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = {file.stem: yaml.safe_load(file.read_text()) for file in ROOT.glob(".github/workflows/*.yml")}
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def run(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("files", "schema"), SCHEMAS.items())
def test_forms_and_workflows_are_what_github_takes(files, schema):
    found = sorted(ROOT.glob(files))
    assert found
    run("check_jsonschema", "--builtin-schema", schema, *found)


def test_a_wrong_workflow_is_refused(tmp_path):
    (tmp_path / "bad.yml").write_text(
        "on: push\njobs: {a: {runs-on: ubuntu-latest, steps: [{run: ls, uses: x}, {rum: ls}]}}"
    )
    with pytest.raises(AssertionError, match="rum"):
        run("check_jsonschema", "--builtin-schema", "vendor.github-workflows", tmp_path / "bad.yml")


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_questions_of_a_form_have_ids_and_labels_of_their_own(name):
    """GitHub refuses a form with two equal ids or labels; its schema can't say so."""
    questions = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())["body"]
    for answers in ([one["id"] for one in questions], [one["attributes"]["label"] for one in questions]):
        assert len(set(answers)) == len(answers) > 1


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_workflows_may_no_more_than_they_need(name):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    for job in WORKFLOWS[name]["jobs"].values():
        assert "timeout-minutes" in job or "environment" in job


@pytest.mark.parametrize("file", [
    "CONTRIBUTING.md", "README.md", ".ci/run", ".pre-commit-config.yaml", ".github/pull_request_template.md",
    *(f".github/workflows/{name}.yml" for name in WORKFLOWS),
])  # fmt: skip
def test_make_targets_that_are_named_exist(file):
    named = re.findall(r"(?:^|`|run: |entry: )make ([a-z][a-z ]*)", (ROOT / file).read_text(), flags=re.M)
    assert named
    for target in {word for words in named for word in words.split()}:
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.M), target


def test_supported_pythons_are_the_same_everywhere():
    metadata = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', metadata) == PYTHONS
    assert f'requires-python = ">={PYTHONS[0]}"' in metadata
    assert WORKFLOWS["tests"]["jobs"]["pinned"]["strategy"]["matrix"]["python"] == PYTHONS
    steps = WORKFLOWS["tests"]["jobs"]["compat"]["steps"]
    assert steps[1]["with"]["python-version"].split() == [PYTHONS[0], PYTHONS[-1]]
    assert steps[2]["run"].endswith(f"python{PYTHONS[-1]}")


def test_one_version_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == protopush.__version__
    assert f"## {protopush.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    hooks = {
        hook["repo"]: hook.get("rev")
        for hook in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    }
    assert (
        f"ruff=={hooks['https://github.com/astral-sh/ruff-pre-commit'][1:]}" in (ROOT / "constraints.txt").read_text()
    )


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert (ROOT / target).is_file(), target
    assert text.count("```") == 2 * sum(len(blocks(language, text)) for language in ("bash", "python", "yaml", "text"))


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """The sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    run("build", "--no-isolation", "--outdir", out, ROOT)
    return out


@pytest.fixture(scope="module")
def wheel(packages) -> ZipFile:
    return ZipFile(next(packages.glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    return HeaderParser().parsestr(wheel.read(name).decode())


def test_packages_are_what_the_index_takes(packages):
    assert run("twine", "check", "--strict", *packages.iterdir()).count("PASSED") == 2


def test_the_wheel_is_whole(wheel):
    """Every file of the package that git keeps, and the recipes."""
    kept = subprocess.run(
        ["git", "ls-files", "src/protopush", "recipes"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    files = {name.removeprefix("src/protopush/") for name in kept.stdout.split()}
    inside = {name.removeprefix("protopush/") for name in wheel.namelist() if name.startswith("protopush/")}
    assert inside == files
    assert {"py.typed", "recipes/elpv.yaml", "app/templates/app.css", "report/templates/report.html.j2"} <= inside


def test_the_sdist_can_be_worked_with(packages):
    with tarfile.open(next(packages.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "Makefile",
        "train.py",
        "constraints.txt",
        "tests/conftest.py",
        "docs/index.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
    }
    assert wanted <= names


def test_metadata_for_people(metadata):
    addresses = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Issues", "Changelog"} <= set(addresses)
    assert all(address.startswith("https://") for address in addresses.values())
    assert metadata["Requires-Python"] == f">={PYTHONS[0]}"


def test_requirements_have_lower_bounds_that_the_pins_keep(metadata):
    """Else the reproducible install could not be had; upper bounds only where something is known to break."""
    pins = dict(
        re.match(r"([\w.-]+)==([\w.]+)", line).groups()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and '< "3.11"' not in line
    )
    pins = {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in pins.items()}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        operators = {one.operator for one in requirement.specifier}
        assert operators == {">="}, requirement
        assert pins[requirement.name.lower()] in SpecifierSet(str(requirement.specifier)), requirement


def test_a_wheel_alone_does_it_all(packages, tmp_path):
    """Outside the tree: the smoke test of `make compat` with these versions, its commands in one process."""
    site, script = tmp_path / "site", ROOT / "tests" / "scripts" / "smoke.py"
    run("pip", "install", "--quiet", "--no-deps", "--target", site, next(packages.glob("*.whl")))
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def outside(*words: object) -> str:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert outside("-c", "import protopush; print(protopush.__file__)").startswith(str(site))
    assert outside(script, tmp_path / "work", "--together").startswith("core ")
