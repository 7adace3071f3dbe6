"""What the pages say must be there: links, options of the command line, and nothing of one machine."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from ghostify.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEXTS = [
    path
    for folder in ("ghostify", "tests", "examples", "benchmarks", "docs", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".md", ".jinja", ""} and path.is_file()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_that_is_named_is_there(page):
    for target in re.findall(r"`((?:docs|examples|benchmarks|tests|ghostify)/[\w/.]+)`", page.read_text()):
        assert (ROOT / target).exists(), target


def test_the_page_of_the_command_line_lists_every_option():
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", (ROOT / "docs/cli.md").read_text(), re.M | re.S))
    commands = get_command(app).commands
    assert list(sections) == list(commands)
    sections["convert"] += sections["plan"]  # "the options of plan, and"
    for name, command in commands.items():
        told = set(re.findall(r"--[a-z][\w-]*", sections[name]))
        known = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert known - told == set(), f"{name}: not on the page"
        assert told - known == set(), f"{name}: not in the program"


def test_nothing_is_of_one_machine():
    folders = re.compile(r"(?<![\w.])/(home|root|work|tmp|Users)/\w")
    offenders = [path for path in TEXTS if path != Path(__file__) and folders.search(path.read_text(errors="ignore"))]
    assert not offenders
