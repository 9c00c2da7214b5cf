"""The command line: `dpo-fast COMMAND ...`. Every command imports what it needs when it runs, so `--help` is instant.

To add a command, write `add_x(parser)`, which declares its arguments, and `run_x(arguments) -> exit status`, and list
them in `COMMANDS`.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import dpo_fast
from dpo_fast.text import clean_logs, shown

MATPLOTLIB_HINT = "(PNG charts need matplotlib: pip install matplotlib, then run this again)"
EVALUATION_HINT = "(no pairs are held out: eval_split: 0.1 evaluates on a tenth of them, before and after)"

DEBUG_HELP = "with an error, its traceback before the sentence"

LITTLE_MARGIN = 0.01  # a loss of 0.6881 instead of 0.6931


class Command(NamedTuple):
    """A subcommand. `raw`: its arguments are not parsed here but passed on as they are, in `arguments.rest`."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    raw: bool = False


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for results (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="write into --out though it holds files of others")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another model (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)


def run_demo(arguments: argparse.Namespace) -> int:
    """Train, align, measure, report; status 1 when a claimed effect did not come about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here; nothing may wait for a network
    from dpo_fast.training import folder
    from dpo_fast.training.sources import BadInput

    try:
        folder.check(arguments.out, reads={}, overwrite=arguments.overwrite, by="dpo-fast demo")
    except BadInput as error:
        return _say("demo", str(error), 2, arguments.debug)
    print("dpo-fast demo: about two minutes on a CPU, no downloads", flush=True)
    from dpo_fast.demo import console, pages, story

    folder.begin(arguments.out, "dpo-fast demo", None)
    console.quiet_libraries()
    try:
        results = story.run(arguments.out, story.Settings(seed=arguments.seed))
        paths = pages.write(results, arguments.out)
    except OSError as error:
        return _say("demo", str(error), 1, arguments.debug)
    print(f"\n{pages.summary(results)}\n")
    _print_paths({"report": paths[0], "numbers": arguments.out / "results.json"}, paths[1:])
    print(f"  base model  {arguments.out / 'base'}   (dpo-fast train examples/format.yaml aligns it again)")
    print(f"  aligned     {arguments.out / 'aligned'}\n  took        {results['seconds']:.0f} s")
    broken = [claim for claim in results["claims"] if not claim["holds"]]
    for claim in broken:
        print(f"dpo-fast demo: this run did not show: {claim['claim']} (measured {claim['measured']})", file=sys.stderr)
    return 1 if broken else 0


def own_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing: a raw command parses its arguments itself, with what it has to import for that."""


def run_train(arguments: argparse.Namespace) -> int:
    """Train any model on any preference data; status 2 for input that cannot be used, 1 for what the machine lacks."""
    import torch

    from dpo_fast.report import run
    from dpo_fast.training import launch, outcome, preflight

    if {"-h", "--help"} & set(arguments.rest):
        print(launch.help_text())
        return 0
    clean_logs("transformers", "datasets", "accelerate", "huggingface_hub", "peft")
    job = trainer = None
    try:
        job, config = launch.read_job(arguments.rest)
        trainer = launch.make_trainer(job, config)
        result = outcome.train(trainer, job)
    except outcome.Finished as finished:
        if trainer is not None and trainer.is_world_process_zero():
            print(shown(f"dpo-fast train: {finished}"))
        return 0
    except KeyboardInterrupt:
        return _say("train", outcome.interrupted(trainer, job), 130, arguments.debug)
    except outcome.Diverged as error:
        return _say("train", str(error), 1, arguments.debug)
    except launch.BadInput as error:
        return _say("train", str(error), 2, arguments.debug)
    except torch.OutOfMemoryError as error:
        less = "a smaller per_device_train_batch_size with more gradient_accumulation_steps, or gradient_checkpointing"
        return _say("train", f"{launch.one_line(error)} (what takes less: {less})", 1, arguments.debug)
    except (OSError, ValueError) as error:  # of the training: a full disk, a setting that torch refuses
        if preflight.being_read(error) is not None:
            return _say("train", preflight.sentence(error), 2, arguments.debug)
        if isinstance(error, ValueError) and not preflight.is_said(error):
            raise
        return _say("train", launch.one_line(error), 1, arguments.debug)
    except Exception as error:  # whatever a library raises that reads what lies with the model
        if preflight.being_read(error) is None:
            raise
        return _say("train", preflight.sentence(error), 2, arguments.debug)
    if not trainer.is_world_process_zero():
        return 0
    print(shown(f"\n{run.summary(result)}\n"))
    if not result["has_evaluation"]:
        print(f"  {EVALUATION_HINT}\n")
    if hint := _hardly_moved(result):
        print(f"  {hint}\n")
    assert config.output_dir is not None  # transformers sets it
    out = Path(config.output_dir)
    _print_paths({"report": out / "report.html", "numbers": out / "results.json", "model": out}, result["png"])
    return 0


def _hardly_moved(result: dict) -> str | None:
    """A sentence where the last logged margin between the rewards is next to nothing, as with TRL's learning rate on a
    small model."""
    margins = [logs["rewards/margins"] for logs in result["log"] if "rewards/margins" in logs]
    if not margins or abs(margins[-1]) >= LITTLE_MARGIN:
        return None
    rate = result["settings"]["learning_rate"]
    return (
        f"(the model has hardly moved: the rewards are {margins[-1]:.2g} apart after {result['steps']} steps at a "
        f"learning_rate of {rate}; more steps or a larger one move it)"
    )


def _say(command: str, sentence: str, status: int, debug: bool = False) -> int:
    """The sentence; with --debug, below the traceback of the exception that is handled."""
    if debug:
        print(shown(traceback.format_exc()), file=sys.stderr, end="")
    if status != 2:  # a progress bar may stand on the line
        print(file=sys.stderr)
    print(shown(f"dpo-fast {command}: {sentence}"), file=sys.stderr)
    return status


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="folder of a run, with its results.json")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="page to write (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)


def run_report(arguments: argparse.Namespace) -> int:
    """Runs side by side on one page; status 2 for what is no run, 1 for a page that cannot be written."""
    from dpo_fast.report import compare, files, record

    try:
        page = compare.compare(arguments.runs)
    except record.NoRecord as error:
        return _say("report", str(error), 2, arguments.debug)
    try:
        files.write_text(arguments.output, page)
    except OSError as error:
        return _say("report", str(error), 1, arguments.debug)
    _print_paths({"report": arguments.output})
    return 0


def run_env(arguments: argparse.Namespace) -> int:
    from dpo_fast import env

    return env.main(arguments.rest)


def run_selftest(arguments: argparse.Namespace) -> int:
    from dpo_fast import selftest

    return selftest.main(arguments.rest)


def run_bench(arguments: argparse.Namespace) -> int:
    """`dpo-fast bench NAME ...`: a module of the checkout's benchmarks/, which the installed package does not hold."""
    names = ("head", "level1", "accuracy", "train_step", "gemm", "attention", "sweep", "demo", "bars", "curves")
    root = Path(dpo_fast.__file__).resolve().parents[1]
    if not arguments.rest or arguments.rest[0] not in names:
        print(f"dpo-fast bench: name one of {', '.join(names)}, then its options (--help lists them)", file=sys.stderr)
        return 2
    if not (root / "benchmarks").is_dir():
        print("dpo-fast bench: benchmarks/ is not installed; run this from a checkout of dpo_fast", file=sys.stderr)
        return 2
    sys.path.insert(0, str(root))
    return importlib.import_module(f"benchmarks.{arguments.rest[0]}").main(arguments.rest[1:])


def run_trl(arguments: argparse.Namespace) -> int:
    """TRL's own command line with our trainers; status 2 for another script, 1 where TRL is missing or too old."""
    try:
        from dpo_fast.trl import command

        command.run(arguments.rest)
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        return _say("trl", str(error), 1)
    except command.UsageError as error:
        return _say("trl", str(error), 2)
    return 0


def _without_debug(options: list[str]) -> tuple[list[str], bool]:
    """The options without `--debug` alone, which is ours, and whether it was there. With a value, as in `--debug
    underflow_overflow`, it is a key of transformers."""
    following = [*options[1:], "--"][: len(options)]
    ours = [
        option == "--debug" and (after.startswith("--") or after.endswith((".yaml", ".yml")))
        for option, after in zip(options, following, strict=True)
    ]
    return [option for option, mine in zip(options, ours, strict=True) if not mine], any(ours)


def _print_paths(files: dict[str, Path], pngs: list | None = None) -> None:
    for name, path in files.items():
        print(shown(f"  {name:<10}  {path}"))
    if pngs is not None:
        print(shown(f"  {'charts':<10}  {', '.join(str(path) for path in pngs) or MATPLOTLIB_HINT}"))


COMMANDS = {
    "demo": Command("train a small language model and align it, in two minutes on a CPU", add_demo, run_demo),
    "train": Command("train a model on preference pairs", own_arguments, run_train, raw=True),
    "trl": Command(
        "TRL's own script, as in `dpo-fast trl dpo --help`, with the trainer here", own_arguments, run_trl, raw=True
    ),
    "report": Command("put training runs side by side on one page", add_report, run_report),
    "env": Command("versions, device, and which implementation runs here", own_arguments, run_env, raw=True),
    "selftest": Command("check the kernels against the oracle on this machine", own_arguments, run_selftest, raw=True),
    "bench": Command("run a benchmark of the checkout: head, level1, ...", own_arguments, run_bench, raw=True),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of `dpo-fast`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dpo-fast", description="Direct Preference Optimization, exact and fast.")
    parser.add_argument("--version", action="version", version=f"dpo-fast {dpo_fast.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        command.add_arguments(subparser)
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS and COMMANDS[argv[0]].raw:
        rest, debug = _without_debug(argv[1:]) if argv[0] == "train" else (argv[1:], False)
        arguments = argparse.Namespace(command=argv[0], rest=rest, debug=debug)
    else:
        arguments = parser.parse_args(argv)
    try:
        status = COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads it, as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        name = error.name or "dpo_fast"
        if name.split(".")[0] == "dpo_fast":
            raise
        package = {"yaml": "pyyaml"}.get(name, name.split(".")[0].replace("_", "-"))
        return _say(arguments.command, f"the package {package} is missing: pip install {package}", 1, arguments.debug)
    except KeyboardInterrupt:
        return _say(arguments.command, "interrupted", 130, arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
