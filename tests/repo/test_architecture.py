"""The arrows between the parts, and what can be imported without what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_fast

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dpo_fast"

# who may import whom inside the package; training, trl, report, cli and the demo may import everything
OPS = {"ops", "comparisons"}
STAGE = OPS | {"batch", "layout", "attention", "forward", "logps", "losses", "objective", "metrics", "heads"}
STAGE |= {"block_mask", "flash", "flex", "scores", "hooks", "packing", "probe", "preference", "reference", "functional"}
STAGE |= {"copies", "router", "drift", "terms", "quantised", "transfer"}
ALLOWED = {"kernels": {"kernels"}, "ops": {"ops", "comparisons", "kernels"}, "comparisons": set(), "testing": {"ops"}}
HEAVY = {"accelerate", "datasets", "peft", "trl", "matplotlib"}
MAY_BE_HEAVY = {"training", "trl", "report", "cli", "demo", "data", "env", "selftest"}


def modules():
    for file in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        if "kernels" in file.parts and file.is_relative_to(PACKAGE):
            continue  # the symlink
        name = file.relative_to(PACKAGE if file.is_relative_to(PACKAGE) else ROOT)
        yield file, name.parts[0].removesuffix(".py")


def stem_of(file: Path, node: ast.ImportFrom) -> str:
    """What is imported from, resolved against the file's package."""
    package = ["dpo_fast", *file.relative_to(PACKAGE if file.is_relative_to(PACKAGE) else ROOT).parent.parts]
    base = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


def imports(file: Path) -> set[str]:
    """Dotted names imported anywhere in a file; relative ones resolved against its package."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = stem_of(file, node)
            found |= {f"{stem}.{alias.name}" for alias in node.names} if stem == "dpo_fast" else {stem}
    return found


@pytest.mark.parametrize("file, part", list(modules()), ids=lambda value: getattr(value, "name", value))
def test_imports_follow_the_arrows(file, part):
    names = imports(file)
    inside = {name.split(".")[1] for name in names if name.startswith("dpo_fast.")} - {"__version__"}
    outside = {name.split(".")[0] for name in names}
    allowed = ALLOWED.get(part, STAGE if part in STAGE else None)
    if allowed is not None:
        assert inside <= allowed, f"{part} imports {inside - allowed}"
    if part not in MAY_BE_HEAVY:
        assert not outside & HEAVY, f"{part} imports {outside & HEAVY}"
    if part == "kernels":
        assert outside <= {"torch", "triton", "dpo_fast", *sys.stdlib_module_names}
    if part == "ops":
        others = {"liger_kernel"} if file.stem == "liger" else set()
        assert outside <= {"torch", "dpo_fast", *others, *sys.stdlib_module_names}
    else:
        assert "kernels" not in outside, "the folder is imported as dpo_fast.kernels"


# The floors of the house, from the ground: a module imports from lower floors alone, at its top or inside a function
FLOORS = """
0  comparisons copies data data.facts data.opinions demo demo.console dpo_fast hooks integrations kernels.numerics
   kernels.sequence_sum kernels.tuned logps ops ops.checks ops.dispatch ops.roofline ops.stats prepared report
   report.charts report.files scores testing text training training.aliases training.rows training.sampler
   training.sources transfer trl.seams wrappers
1  batch data.make_pairs demo.corpus demo.measure heads kernels.token_logps losses ops.oracle ops.plan
   ops.softmax quantised report.png report.record report.svg training.written
2  demo.language_model layout objective ops.call ops.gemm ops.sequence report.page report.pairs router
   training.folder training.keys
3  block_mask demo.pages demo.story flash flex metrics ops.liger ops.logits ops.tile report.run terms
   rows training.recipe training.settings
4  attention ops.head_op ops.impl_torch ops.impl_triton ops.pairwise report.callback report.compare training.card
   trl.token_logits trl_rows
5  env ops.linear probe
6  integrations.torchtune packing preference selftest
7  forward
8  functional trl.installed
9  completion reference training.finite training.reference_columns
10 drift training.checkpoints training.data trl.checks
11 training.config training.facts
12 training.models
13 training.preflight training.references trl.mixin
14 training.trainer trl.fused_head trl.scoring
15 training.launch trl.concatenated trl.full_logits
16 training.outcome trl
17 cli
14 trl.others
15 trl.command trl.cpo trl.kto trl.orpo
"""
FLOOR: dict[str, int] = {}
for word in FLOORS.split():
    if word.isdecimal():
        number = int(word)
    else:
        FLOOR[word] = number
# module -> what it imports from above, inside a function, where an object is made of whichever kind is asked for
FROM_ABOVE = {"report": {"report.callback"}}


def dotted(file: Path) -> str:
    """As in FLOORS: without dpo_fast, "dpo_fast" for the package itself."""
    parts = file.relative_to(PACKAGE if file.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "dpo_fast"


def test_imports_go_down_only():
    files = {dotted(file): file for file, _ in modules()}
    assert files.keys() == FLOOR.keys(), files.keys() ^ FLOOR.keys()
    for name, file in files.items():
        if name == "dpo_fast":  # its imports are for type checkers
            continue
        found = {x.removeprefix("dpo_fast.") for x in names_imported(file) if x.split(".")[0] != "trl"}  # TRL itself
        up = {x for x in found & FLOOR.keys() if x != name and FLOOR[x] >= FLOOR[name]} - {"dpo_fast"}
        assert up == FROM_ABOVE.get(name, set()), f"{name}, on floor {FLOOR[name]}, imports {up}"


def names_imported(file: Path) -> set[str]:
    """Dotted names, of what is imported and of where from."""
    found = imports(file)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{stem_of(file, node)}.{alias.name}" for alias in node.names}
    return found


def test_type_checkers_see_the_public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: f"dpo_fast.{node.module}" for node in block.body for alias in node.names}
    assert seen == dpo_fast._PUBLIC


def run_python(code: str, cwd: Path = ROOT) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.thorough
def test_import_needs_torch_alone():
    """With triton, transformers, trl, peft and the rest absent, everything that needs only torch works."""
    run_python(
        """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    names = {"triton", "transformers", "trl", "peft", "accelerate", "datasets", "matplotlib", "yaml"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import torch
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in Absent.names else found(name, *rest)

import dpo_fast
logits = torch.randn(4, 9, requires_grad=True)
logps = dpo_fast.logits_token_logps(logits, torch.tensor([1, 2, -100, 3]))
sums = dpo_fast.sequence_logps(logps, torch.tensor([0, 0, 1, 1]), 2)
loss = dpo_fast.preference_loss(sums[:1], sums[1:], sums[:1].detach(), sums[1:].detach())
loss.sum().backward()
assert abs(loss.item() - 0.6931471805) < 1e-6, loss
try:
    dpo_fast.logits_token_logps(logits, torch.tensor([1, 2, -100, 3]), impl="triton")
except ValueError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("impl='triton' ran without triton")
try:
    dpo_fast.FastDPOTrainer
except ImportError as error:
    assert "dpo_fast.FastDPOTrainer needs" in str(error) and ": pip install" in str(error), error
else:
    raise AssertionError("a Trainer without transformers")
"""
    )


@pytest.mark.thorough
def test_a_package_named_kernels_is_not_shadowed(tmp_path):
    """Hugging Face publishes one, and transformers probes for it by name: from the root it must find that, not ours."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("REAL = True\n")
    info = tmp_path / "kernels-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.1.0\n")
    run_python(
        f"""
import sys
assert sys.path[0] == ""  # the root, as for `python -m` there
sys.path.append({str(tmp_path)!r})
import kernels
assert kernels.REAL, kernels
import dpo_fast.kernels.token_logps
import transformers
config = transformers.LlamaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)
transformers.AutoModelForCausalLM.from_config(config)
"""
    )


def test_kernels_is_a_plain_folder_behind_a_relative_symlink():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (PACKAGE / "kernels").is_symlink() and str((PACKAGE / "kernels").readlink()) == "../kernels"
    assert not (ROOT / "conftest.py").exists()


def test_public_names_exist():
    """Each is defined where it is said to be. Importing them all would import transformers and accelerate, which takes
    15 s and is what the tests of those names do."""
    assert set(dpo_fast.__all__) == {*dpo_fast._PUBLIC, "__version__"} and set(dpo_fast.__all__) <= set(dir(dpo_fast))
    for name, module in dpo_fast._PUBLIC.items():
        file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        assert name in defined_names(file), f"{module} does not define {name}"
    with pytest.raises(AttributeError, match="public names"):
        _ = dpo_fast.nothing


def defined_names(file: Path) -> set[str]:
    """Classes, functions and variables at a module's top level."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names
