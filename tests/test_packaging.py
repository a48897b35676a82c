"""Guards what is released: metadata, links, citation, and the workflows that publish."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it along where the standard library has none
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
REPOSITORY = "https://example.org/owner/covft"


# ---------------------------------------------------------------------------------------- metadata


@pytest.fixture
def built(monkeypatch):
    """Returns the table `[project]` as hatchling completes it, with these variables set and no others."""
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def complete(**variables):
        for name in ("REPOSITORY_URL", "SITE_URL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        metadata = {"version": "0.1.0"}
        module.RepositoryLinks(str(ROOT), {}).update(metadata)
        return metadata

    return complete


def test_without_an_address_the_metadata_invents_none(built):
    metadata = built()
    assert metadata["urls"] == {"Paper": "https://arxiv.org/abs/2603.21077"}
    assert metadata["readme"]["text"] == (ROOT / "README.md").read_text(encoding="utf-8")


def test_with_an_address_the_package_links_to_it(built):
    urls = built(REPOSITORY_URL=f"{REPOSITORY}/", SITE_URL="https://owner.example.org/covft/")["urls"]
    assert urls["Repository"] == REPOSITORY
    assert urls["Changelog"] == f"{REPOSITORY}/blob/main/CHANGELOG.md"
    assert urls["Documentation"] == "https://owner.example.org/covft/"


def test_with_an_address_every_link_of_the_readme_works_outside_the_repository(built):
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    after = built(REPOSITORY_URL=REPOSITORY)["readme"]["text"]
    targets = re.findall(r"\]\(([^)\s]+)\)", after)
    assert [target for target in targets if not target.startswith("https://")] == []
    assert f"]({REPOSITORY}/raw/v0.1.0/docs/assets/block.svg)" in after
    files = [target.removeprefix(f"{REPOSITORY}/blob/v0.1.0/") for target in targets if "/blob/" in target]
    assert len(files) > 20
    assert [file for file in files if not (ROOT / file.partition("#")[0]).is_file()] == []
    assert re.sub(rf"{REPOSITORY}/(blob|raw)/v0.1.0/", "", after) == before


def test_the_site_takes_the_addresses_of_the_same_variables():
    """In a process of its own: `!ENV` reads the variables when the file is read."""
    pytest.importorskip("mkdocs")
    code = (
        "from mkdocs.config import load_config\n"
        "config = load_config('mkdocs.yml')\n"
        "print([config.site_url, config.repo_url, config.edit_uri])"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("REPOSITORY_URL", "SITE_URL")}
    addresses = {"REPOSITORY_URL": REPOSITORY, "SITE_URL": "https://owner.example.org/covft/"}
    for variables, shown in [({}, ["", "", ""]), (addresses, [addresses["SITE_URL"], REPOSITORY, ""])]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**clean, **variables, "NO_MKDOCS_2_WARNING": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.strip().splitlines()[-1:] == [str(shown)], done.stderr


# ---------------------------------------------------------------------------------------- citation


def test_readme_and_citation_file_name_the_same_paper():
    [paper] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [entry] = re.findall(r"^```bibtex\n(.*?)^```", readme, flags=re.M | re.DOTALL)
    fields = dict(re.findall(r"^ +(\w+) += \{(.*)\},?$", entry, flags=re.M))
    assert entry.startswith("@inproceedings{")
    assert paper["type"] == "conference-paper"
    assert fields["title"] == paper["title"]
    assert fields["year"] == str(paper["year"]) == "2026"
    assert fields["booktitle"] == paper["collection-title"]
    assert paper["conference"]["name"] == "CVPR 2026"
    assert fields["note"] == paper["identifiers"][0]["value"] == "arXiv:2603.21077"
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert fields["author"] == " and ".join(names)


# --------------------------------------------------------------------------------------- workflows

# What a job may do beyond reading the repository.
MAY_WRITE = {
    ("release", "publish"): {"id-token": "write", "attestations": "write"},
    ("docs", "publish"): {"contents": "write"},
}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_grants_no_more_than_its_jobs_need(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert job["permissions"] == MAY_WRITE.get((path.stem, name), {"contents": "read"})
        for step in job["steps"]:
            if "uses" in step:
                assert re.search(r"@[0-9a-f]{40}$", step["uses"]), step["uses"]


def test_the_job_that_publishes_runs_no_code_of_the_repository():
    """It holds the right to publish, so it only takes the files that were built and tested without it."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["publish"]["needs"] == "build"
    used = [step.get("uses", "run").partition("@")[0] for step in jobs["publish"]["steps"]]
    assert used == [
        "actions/download-artifact",
        "actions/attest-build-provenance",
        "pypa/gh-action-pypi-publish",
    ]
    assert any(step.get("run", "").startswith("make package") for step in jobs["build"]["steps"])


@pytest.mark.parametrize(("name", "job"), [("release", "build"), ("docs", "publish")])
def test_workflows_tell_the_address_of_the_repository_that_they_run_in(name, job):
    jobs = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs[job]["env"]["REPOSITORY_URL"] == "${{ github.server_url }}/${{ github.repository }}"
    assert "github.repository_owner" in jobs[job]["env"]["SITE_URL"]
