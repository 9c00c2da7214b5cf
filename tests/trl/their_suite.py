"""TRL's own tests of its trainers, once with its classes and once with this package's, and what differs.

    python tests/trl/their_suite.py 0.23.1                    the tests that the release's sdist holds (0.18 to 0.23 do)
    python tests/trl/their_suite.py --tests ~/trl/tests       those of a checkout
    ... --python .interop/trl-0.24/bin/python                 with the TRL that this interpreter has, not the one here
    ... --files test_dpo_trainer.py test_cpo_trainer.py -k "not vision"

Needs pytest and parameterized. The tests name models and data of a hub: folders of the same names, with tiny models of
the same classes and a few rows of each kind, lie where the tests run, so that nothing is fetched and nothing in them is
changed. What wants an image, a GPU or more than that fails or is skipped with both classes. Ends with status 1 where a
test passes with TRL's class and not with ours.
"""

import argparse
import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
HUB = "trl-internal-testing"
ROWS = {"train": 17, "test": 2}  # as many as the hub's data set has


# --- what stands for the hub ---------------------------------------------------------------------------------------


def make_hub(folder: Path, *files: Path) -> None:
    """folder/trl-internal-testing: a tiny model for each one that the files name, and the data set zen.

    In a process of the interpreter that will read them: files of a newer transformers need not load in an older one.
    """
    named = {name for file in files for name in re.findall(rf'"{HUB}/(tiny-[\w.-]+)"', file.read_text())}
    for name in sorted(named):
        _make_model(folder / HUB / name, name.split("-")[1])
    _make_zen(folder / HUB / "zen")


def _make_model(folder: Path, architecture: str) -> None:
    import transformers
    from tiny import tiny_tokenizer

    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, architecture, None)
    sizes = dict(
        vocab_size=320, hidden_size=16, d_model=16, intermediate_size=32, num_hidden_layers=2, num_layers=2, n_layer=2,
        encoder_layers=2, decoder_layers=2, num_attention_heads=4, num_heads=4, num_key_value_heads=2, d_ff=32, d_kv=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4, head_dim=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=0, num_experts=4, num_local_experts=4,
        moe_intermediate_size=8, max_position_embeddings=512,
    )  # fmt: skip
    if kind is None or "ForConditionalGeneration" in architecture and "T5" not in architecture:
        return  # a vision model, or one that this transformers does not know
    known = kind.config_class()
    kind(kind.config_class(**{k: v for k, v in sizes.items() if hasattr(known, k)})).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _make_zen(folder: Path) -> None:
    """The kinds of rows that TRL's trainers take, in the hub's names; README.md says which file is which."""
    from tiny import tiny_rows

    lines = ["---", "configs:"]
    for style in ("standard", "conversational"):
        for kind in ("preference", "implicit_prompt_preference", "unpaired_preference", "prompt_only"):
            lines += [f"- config_name: {style}_{kind}", "  data_files:"]
            for split, count in ROWS.items():
                file = folder / f"{style}_{kind}" / f"{split}.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                rows = [_row(style, kind, i, row) for i, row in enumerate(tiny_rows(count, seed=len(split)))]
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
                lines += [f"  - split: {split}", f"    path: {style}_{kind}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def _row(style: str, kind: str, i: int, row: dict) -> dict:
    if style == "conversational":
        role = {"prompt": "user"}
        row = {key: [{"role": role.get(key, "assistant"), "content": text.strip()}] for key, text in row.items()}
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    return {
        "preference": row,
        "implicit_prompt_preference": {"chosen": prompt + chosen, "rejected": prompt + rejected},
        "unpaired_preference": {"prompt": prompt, "completion": (rejected, chosen)[i % 2], "label": bool(i % 2)},
        "prompt_only": {"prompt": prompt},
    }[kind]


# --- inside of pytest, as its plugin -------------------------------------------------------------------------------


def pytest_configure(config) -> None:
    """Before a test is imported: our classes under TRL's names, where they are asked for."""
    import transformers
    import trl

    if not hasattr(transformers.PreTrainedModel, "warnings_issued"):  # TRL before 0.28 writes to it; gone since 5.0
        transformers.PreTrainedModel.warnings_issued = {}
    checked = transformers.TrainingArguments.__post_init__

    def on_cpu(self):
        self.use_cpu = True  # or bf16, which is TRL's default, is refused where there is no GPU
        checked(self)

    transformers.TrainingArguments.__post_init__ = on_cpu
    for file in os.environ["DPO_FAST_TEST_FILES"].split(os.pathsep):
        _add_what_is_gone(Path(file))
    for name in os.environ["DPO_FAST_SWAPPED"].split():
        import dpo_fast.trl

        setattr(trl, name, getattr(dpo_fast.trl, name))


def _add_what_is_gone(file: Path) -> None:
    """Names that a test file imports and these versions lack: what needs them is skipped or fails, with both classes,
    and the rest of the file runs."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("trl", "transformers"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names if not hasattr(module, alias.name)):
                skip = unittest.skip(f"{node.module} has no {name}")
                setattr(module, name, skip if name.startswith("require_") else type(name, (), {}))


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" or report.outcome != "passed":
        line = {"test": report.nodeid.split("/")[-1], "outcome": report.outcome, "why": ""}
        if report.outcome == "failed":
            line["why"] = next((x[1:].strip() for x in report.longreprtext.splitlines() if x.startswith("E ")), "")
        with open(os.environ["DPO_FAST_OUTCOMES"], "a") as file:
            file.write(json.dumps(line) + "\n")


# --- both runs -----------------------------------------------------------------------------------------------------


def tests_of_release(version: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", f"trl=={version}", "--no-deps", "--no-binary", "trl", "-q"]
    subprocess.run([*pip, "--dest", str(folder)], check=True)
    (archive,) = folder.glob("trl-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    tests = folder / archive.name.removesuffix(".tar.gz") / "tests"
    if not tests.is_dir():
        raise SystemExit(
            f"their_suite: the sdist of TRL {version} holds no tests; get them by `git clone --branch v{version} "
            "https://github.com/huggingface/trl` and name the folder: --tests trl/tests"
        )
    return tests


def _environment() -> dict[str, str]:
    places = [str(ROOT), str(ROOT / "tests"), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def outcomes(python: str, files: list[Path], chosen: str, hub: Path, swapped: list[str]) -> dict[str, dict]:
    """test -> what came of it."""
    tests = files[0].parent
    helpers = [file for file in (tests / "testing_utils.py", tests / "conftest.py") if file.exists()]
    out = hub / f"outcomes-{'ours' if swapped else 'theirs'}.jsonl"
    env = {
        **_environment(), "DPO_FAST_OUTCOMES": str(out), "HF_HUB_OFFLINE": "1",
        "DPO_FAST_SWAPPED": " ".join(swapped), "DPO_FAST_TEST_FILES": os.pathsep.join(map(str, [*helpers, *files])),
        "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [python, "-m", "pytest", "-q", "-p", "their_suite", "-p", "no:cacheprovider", "-k", chosen]
    log = out.with_suffix(".log")
    with open(log, "w") as file:
        subprocess.run([*command, *map(str, files)], cwd=hub, env=env, stdout=file, stderr=subprocess.STDOUT)
    if not out.exists():
        raise SystemExit(f"their_suite: no test ran:\n{log.read_text()[-2000:]}")
    return {found["test"]: found for found in map(json.loads, out.read_text().splitlines())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("version", nargs="?", help="a release of TRL")
    parser.add_argument("--tests", type=Path, help="TRL's folder of tests, instead of a release's")
    parser.add_argument("--python", default=sys.executable, help="the interpreter whose TRL is tested")
    parser.add_argument("--files", nargs="+", default=["test_dpo_trainer.py"])
    parser.add_argument("-k", default="not vision and not vdpo and not VLM and not vlm", help="as pytest's")
    arguments = parser.parse_args()
    if (arguments.version is None) == (arguments.tests is None):
        parser.error("name a release, or a folder of tests")
    with tempfile.TemporaryDirectory() as there:
        hub = Path(there)
        tests = arguments.tests.resolve() if arguments.tests else tests_of_release(arguments.version, hub)
        copied = Path(shutil.copytree(tests, hub / "their_tests"))  # beside trl's source, that would be imported
        (copied / "__init__.py").touch()
        files = [copied / name for name in arguments.files]
        making = "import pathlib, sys, their_suite; their_suite.make_hub(*map(pathlib.Path, sys.argv[1:]))"
        subprocess.run([arguments.python, "-c", making, there, *map(str, files)], env=_environment(), check=True)
        swapped = [re.sub(r"test_(\w+)_trainer.py", r"\1", name).upper() + "Trainer" for name in arguments.files]
        runs = [outcomes(arguments.python, files, arguments.k, hub, names) for names in ([], swapped)]
    return report(*runs)


def report(theirs: dict[str, dict], ours: dict[str, dict]) -> int:
    for name, found in (("TRL's class", theirs), ("ours", ours)):
        counts = {kind: sum(x["outcome"] == kind for x in found.values()) for kind in ("passed", "failed", "skipped")}
        print(f"{name:12}", ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    nothing = {"outcome": "not run", "why": ""}
    for test in sorted(theirs | ours):
        a, b = theirs.get(test, nothing), ours.get(test, nothing)
        if a["outcome"] != b["outcome"]:
            print(f"  {test}: {a['outcome']} -> {b['outcome']} {a['why'] or b['why']}"[:300])
    both = sorted(x["why"] for test, x in theirs.items() if x["outcome"] == "failed" == ours[test]["outcome"])
    for why in dict.fromkeys(both):
        print(f"  with both, {both.count(why)} x: {why}"[:300])
    return any(x["outcome"] == "passed" != ours.get(test, nothing)["outcome"] for test, x in theirs.items())


if __name__ == "__main__":
    sys.exit(main())
