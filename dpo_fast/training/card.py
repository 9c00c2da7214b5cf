"""README.md beside a saved model: what it was trained on and how, in a section that later saves replace."""

import html
from pathlib import Path

from dpo_fast.report.files import write_text
from dpo_fast.report.record import versions
from dpo_fast.report.run import SHOWN

BEGIN, END = "<!-- dpo_fast: what follows is written at each save -->", "<!-- dpo_fast: end -->"
PEFTS_TEMPLATE = "# Model Card for Model ID"  # 190 lines that nobody has filled in, just saved
CITATION = """```bibtex
@inproceedings{rafailov2023direct,
  title = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and Stefano Ermon and
            Chelsea Finn},
  booktitle = {Advances in Neural Information Processing Systems 36},
  year = {2023},
  url = {https://arxiv.org/abs/2305.18290},
}
```"""


def read(folder: Path) -> str | None:
    """The README.md that lies there, None if there is none."""
    path = folder / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def is_ours(text: str | None) -> bool:
    """Whether a README.md may be written over: in part, between our marks, or because there is none."""
    return text is None or (BEGIN in text and END in text)


def write(folder: Path, base: str, rows: list[tuple[str, str]], log: list[dict]) -> Path:
    """Write our section into the folder's README.md, at its end where it has none yet. base: the model's name or path.

    What is there without our section is kept, but for PEFT's template, of which only the head stays.
    """
    section = "\n".join([BEGIN, "", *_section(base, rows, log), "", END])
    there = read(folder)
    if there is None or (PEFTS_TEMPLATE in there and not is_ours(there)):
        head = _head(base) if there is None else there[: there.index(PEFTS_TEMPLATE)]
        text = f"{head.rstrip()}\n\n# {folder.resolve().name}\n\n{section}\n"
    elif is_ours(there):
        text = there[: there.index(BEGIN)] + section + there[there.index(END) + len(END) :]
    else:
        text = f"{there.rstrip()}\n\n{section}\n"
    return write_text(folder / "README.md", text)


def _head(base: str) -> str:
    """What the hub reads. A folder of this machine is no name of a model there."""
    known = [f"base_model: {base}"] if base and not Path(base).exists() and not base.startswith((".", "/")) else []
    return "\n".join(["---", "library_name: transformers", *known, "tags:", "- dpo", "- dpo_fast", "---", ""])


def _section(base: str, rows: list[tuple[str, str]], log: list[dict]) -> list[str]:
    lines = [
        "## Training",
        "",
        f"Trained with Direct Preference Optimization from {_code(_name(base)) if base else 'a model without a name'}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in rows),
    ]
    if metrics := _metrics(log):
        lines += ["", "| metric | training, last logged | evaluation, last |", "|---|---|---|", *metrics]
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [*lines, "", f"Versions: {found}.", "", "## Citation", "", CITATION]


def _metrics(log: list[dict]) -> list[str]:
    trained: dict = next((logs for logs in reversed(log) if "loss" in logs), {})
    evaluated: dict = next((logs for logs in reversed(log) if "eval_loss" in logs), {})
    cells = [(name, trained.get(name), evaluated.get(f"eval_{name}")) for name in SHOWN]
    return [
        f"| {name} | {'' if ours is None else f'{float(ours):.4f}'} | "
        f"{'' if other is None else f'{float(other):.4f}'} |"
        for name, ours, other in cells
        if ours is not None or other is not None
    ]


def _name(path: str) -> str:
    """A folder's own name instead of its path on this machine."""
    return Path(path).resolve().name if Path(path).exists() else path


def _cell(value: str) -> str:
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


def rows_of(trainer, data: str, reference: tuple[str, str]) -> list[tuple[str, str]]:
    """(name, value): data, loss, beta, reference and what else of the settings decides about the model."""
    args, objective = trainer.args, trainer.objective
    losses = [
        name if weight == 1 else f"{weight:g} x {name}"
        for name, weight in zip(objective.names, objective.loss_weights, strict=True)
    ]
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    pairs = f"{batch} pairs" if args.tokens_per_batch is None else f"pairs of {args.tokens_per_batch} tokens"
    known = [] if trainer.train_dataset is None or not hasattr(trainer.train_dataset, "__len__") else [
        f"{len(trainer.train_dataset):,} pairs"
    ]  # fmt: skip
    return [
        ("data", ", ".join([*([_name(data)] if data else []), *known]) or "not known"),
        ("loss", " + ".join(losses)),
        ("beta", f"{args.beta:g}"),
        ("reference", f"{_name(reference[0])} ({reference[1]})" if reference[1] else _name(reference[0])),
        ("steps", f"{trainer.state.global_step:,} of {pairs}"),
        ("learning rate", f"{args.learning_rate:g}, {getattr(args.optim, 'value', args.optim)}"),
        ("seed", str(args.seed)),
    ]
