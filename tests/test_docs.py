"""The documentation is true as far as a program can check: links resolve, commands parse, keys and files exist.

``test_snippets.py`` runs the commands.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_dypo
from megatron_dypo.cli import main
from megatron_dypo.commands import parse
from megatron_dypo.config.schema import Config, walk
from tests.test_config import KEYS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "benchmarks" / "README.md"]
SECTIONS = "|".join(Config.model_fields)
KEY = re.compile(rf"`((?:{SECTIONS})(?:\.[a-z_]+)+)(?::[^`]*|=[^`]*)?`")
FILES = (".py", ".json", ".safetensors")
PATH = re.compile(r"`((?:megatron_dypo|benchmarks|tests|tools|launch|examples|requirements|docs)/[\w./-]+)`")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> subprocess.CompletedProcess:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_site_builds_and_every_link_leads_somewhere(site):
    assert site.returncode == 0, site.stderr


def test_a_broken_link_is_seen(tmp_path):
    """Run the site's own check with a missing page."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("[gone](gone.md)")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nstrict: true\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1 and "gone.md" in ran.stderr


def commands(page: Path) -> list[str]:
    """Return what follows ``python -m megatron_dypo`` in the page's code blocks, continued lines joined."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            _, there, rest = line.partition("-m megatron_dypo ")
            if there and not rest.startswith("--help"):  # --help would end the test
                found.append(rest.partition("#")[0].strip())
    return found


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse_and_keys_and_files_exist(page):
    text = page.read_text()
    for command in commands(page):
        options = parse(shlex.split(command))
        for override in getattr(options, "overrides", []):
            name, is_key, _ = override.partition("=")
            assert name in KEYS if is_key else (ROOT / name).is_file(), f"{command}: {override}"
    sections = {name.rpartition(".")[0] for name, _ in walk()}
    names = [name for name in KEY.findall(text) if not name.endswith(FILES)]
    unknown = [name for name in names if name not in KEYS and name not in sections]
    assert unknown == []
    assert [path for path in PATH.findall(text) if not (ROOT / path).exists()] == []


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and mkdocs make of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Return the local links of a page that lead to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_to_files_and_headings(page):
    assert broken_links(page) == []


def test_a_link_to_a_file_or_heading_that_is_missing_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `heading`, here\n[a](#a-heading-here) [b](#gone) [c](gone.md) [d](page.md)")
    assert broken_links(page) == ["#gone", "gone.md"]


def test_the_citation_has_the_package_s_version():
    assert f"\nversion: {megatron_dypo.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_rows_that_the_page_on_scaling_up_quotes_are_the_planner_s(monkeypatch, capsys):
    page = ROOT / "docs/scale-up.md"
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        assert command.startswith("plan ") and main(shlex.split(command)) == 0
    printed = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    columns = next(line for line in printed if line[0] == "layout")
    planned = [dict(zip(columns, line, strict=True)).items() for line in printed if len(line) == len(columns)]
    quoted = []
    for table in re.findall(r"^\| layout .*\n\|[-|]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE):
        quoted += [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    header = [cell.strip() for cell in re.search(r"^\| (layout .*) \|$", page.read_text(), re.MULTILINE)[1].split("|")]
    assert len(quoted) > 8
    assert [
        row for row in quoted if not any(dict(zip(header, row, strict=True)).items() <= one for one in planned)
    ] == []


def test_there_are_commands_keys_and_files_to_check():
    texts = "".join(page.read_text() for page in PAGES)
    assert sum(len(commands(page)) for page in PAGES) > 15
    assert len(set(KEY.findall(texts))) > 40 and len(set(PATH.findall(texts))) > 20


def listings() -> list[tuple[str, str]]:
    """Return (file, listing) of docs/add-an-algorithm.md: a listing belongs to the last file named before it."""
    page, found = (ROOT / "docs/add-an-algorithm.md").read_text(), []
    for block in re.finditer(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        found.append((PATH.findall(page[: block.start()])[-1], block[1]))
    return found


def test_every_listing_of_add_an_algorithm_is_in_the_file_that_it_is_of():
    assert len(listings()) >= 9
    for name, listing in listings():
        text = (ROOT / name).read_text()
        assert text.count(listing) == 1, f"{name} does not hold:\n{listing}"
