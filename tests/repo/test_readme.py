"""README.md and the guide: figures are those of committed results, and what they name exists."""

import ast
import json
import re
from pathlib import Path

import pytest

from benchmarks import figures
from dpo_fast.cli import COMMANDS

ROOT = Path(__file__).parents[2]
TEXT = figures.README.read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "docs" / "guide.md", ROOT / "docs" / "swap.md"]
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
# A number with a unit is measured, or one of these: what somebody sets
MEASURED = re.compile(r"\d[\d.,]*(?:e-?\d+)?(?: |-)?(?:%|x\b|×|times|m?s\b|seconds|minutes|[KMGT]i?B|nats)")


def test_figures_are_those_of_the_results():
    new, count, files = figures.written(TEXT)
    assert new == TEXT, "python -m benchmarks.figures writes them anew"
    assert count >= 40 and len(files) == 4
    for name in files:
        result = json.loads((ROOT / name).read_text(encoding="utf-8"))
        assert result["complete"] and re.fullmatch("[0-9a-f]{40}", result["commit"]), f"{name}: not of a clean commit"


def test_a_figure_that_is_in_no_result_is_found():
    block = figures.BLOCK.search(TEXT)[2]
    digit = figures.FIGURE.search(block, block.index("|---"))
    at = TEXT.index(block) + digit.start()
    assert figures.written(TEXT[:at] + "7" + TEXT[at:])[0] == TEXT


def test_no_measured_figure_stands_elsewhere():
    prose = FENCED.sub("", figures.BLOCK.sub("", TEXT))
    assert not MEASURED.findall(prose)
    assert MEASURED.findall("It is 4.5 times faster, takes 3.0 GiB, 12 s and 98.1 %, and errs by 3.4e-3 nats") == [
        "4.5 times", "3.0 GiB", "12 s", "98.1 %", "3.4e-3 nats"
    ]  # fmt: skip


def test_the_readme_is_five_screens():
    assert len(TEXT.splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [head.lower().replace(" ", "-") for head in heads], link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_and_code_compiles(page):
    text = page.read_text(encoding="utf-8")
    for language, code in FENCED.findall(text):
        if language == "python":
            ast.parse(code)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"`?dpo-fast (\w+)", text):
        assert command in COMMANDS, command
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for script in re.findall(r"(?:python|bash) ((?:examples|benchmarks)/\S+?)[`\s]", text):
        assert (ROOT / script).is_file(), script
