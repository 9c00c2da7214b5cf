"""The notebooks: what is kept in the repository is whole, small and tells nothing of a machine."""

import getpass
import json
import re
import socket
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 1_000_000  # bytes


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def shown(cell: dict) -> list[str]:
    """The texts among a cell's outputs."""
    texts = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        for text in (output.get("text"), output.get("evalue"), *(data.get(kind) for kind in data if "text" in kind)):
            if text is not None:
                texts.append("".join(text))
    return texts


def test_there_are_four():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_outputs_are_whole_and_small(path):
    assert path.stat().st_size < LARGEST
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))  # run once, from top to bottom
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, monkeypatch):
    """No cell raises, and each shows what the kept outputs show, in other digits."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.syspath_prepend(str(FOLDER))
    from execute import executed

    def kinds(cells) -> list[list[str]]:
        return [[output["output_type"] for output in cell["outputs"]] for cell in cells if "outputs" in cell]

    assert kinds(executed(path).cells) == kinds(cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_tell_nothing_of_a_machine(path):
    private = {socket.gethostname(), getpass.getuser()} - {"root", "localhost", ""}
    absolute = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|work|opt|mnt|var|Users|private)/|[A-Z]:\\")
    for cell in cells(path):
        assert set(cell["metadata"]) <= {"tags"}, "times of execution"
        for text in shown(cell) if cell["cell_type"] == "code" else []:
            assert not absolute.search(text), text
            assert not [name for name in private if name in text]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    prose = "".join("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    assert links and not [link for link in links if not (FOLDER / link).is_file()]


def test_the_next_steps_links_lead_somewhere():
    page = ROOT / "docs" / "next-steps.md"
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert len(local) >= 5 and not [link for link in local if not (page.parent / link).exists()]


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path):
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    config = config_args.load_config_from_file(str(path))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
