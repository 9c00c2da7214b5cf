"""`dpo-fast trl dpo ...`: TRL's own script and options, with `trl.DPOTrainer` being ours.

As `trl dpo` does, `launch` starts the script by `accelerate launch`, to which the options go that the script does not
know. What is started is this module: it sets one name of the package `trl`, says so in a line, and runs TRL's file.
"""

import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

TRAINERS = {"dpo": "DPOTrainer", "kto": "KTOTrainer"}  # TRL's script -> the name in the package trl that it trains with
USAGE = """\
usage: dpo-fast trl {dpo,kto} ...

TRL's own scripts with this package's trainers: each option of `trl dpo` and `trl kto`, and --config FILE.yaml.
What `accelerate launch` takes, such as --num_processes 4, goes to it; --accelerate_config names one of TRL's files.
`dpo-fast trl dpo --help` lists the options. Other scripts have nothing to replace: run them as `trl sft`.
"""


class UsageError(ValueError):
    """A command line that names no script of ours."""


def run(options: Sequence[str]) -> None:
    """`dpo-fast trl` with its arguments; leaves by SystemExit for --help and for what TRL's parser refuses."""
    if options and options[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    name = options[0] if options else "nothing"
    if name not in TRAINERS:
        others = "; TRL's other scripts have no trainer of this package: run them by trl itself"
        raise UsageError(f"name {' or '.join(TRAINERS)} after trl, got {name}{others}")
    launch(name, list(options[1:]))


def launch(name: str, options: list[str]) -> None:
    """Run TRL's script `name` by `accelerate launch`; CalledProcessError or SystemExit where that fails, as TRL's."""
    _trainer(name)  # what is missing is said before anything is started
    parser = importlib.import_module(f"trl.scripts.{name}").make_parser()
    parser.prog = f"dpo-fast trl {name}"
    *_, for_accelerate = parser.parse_args_and_config(options, return_remaining_strings=True)
    from accelerate.commands.launch import launch_command, launch_command_parser

    of_script = _without(options, parser.parse_known_args(_without_config(options))[1])
    command = [*_with_config_file(for_accelerate), "-m", "dpo_fast.trl.command", name, *of_script]
    launch_command(launch_command_parser().parse_args(command))


def run_script(name: str) -> None:
    """TRL's file, in this process, with our class under TRL's name. sys.argv[1:] are the script's options."""
    import trl

    trainer, taken = _trainer(name), TRAINERS[name]
    setattr(trl, taken, trainer)
    if os.environ.get("RANK", "0") == "0":
        line = f"trl.{taken} is {trainer.__module__}.{taken}; all else is TRL {trl.__version__}'s"
        print(f"dpo-fast trl {name}: {line}", file=sys.stderr, flush=True)
    runpy.run_module(f"trl.scripts.{name}", run_name="__main__", alter_sys=True)


def _trainer(name: str) -> type:
    return getattr(importlib.import_module("dpo_fast.trl"), TRAINERS[name])


def _without_config(options: list[str]) -> list[str]:
    """TRL's parser takes `--config FILE` out before argparse sees the rest."""
    if "--config" not in options:
        return options
    at = options.index("--config")
    return options[:at] + options[at + 2 :]


def _without(options: list[str], unknown: list[str]) -> list[str]:
    """`unknown` are some of the options, in their order, as argparse leaves them over."""
    left = iter([*unknown, None])
    following, kept = next(left), []
    for option in options:
        if option == following:
            following = next(left)
        else:
            kept.append(option)
    return kept


def _with_config_file(options: list[str]) -> list[str]:
    """`--accelerate_config NAME`, TRL's option, as accelerate's own: a file, or one that TRL ships."""
    if "--accelerate_config" not in options:
        return options
    at = options.index("--accelerate_config")
    if at + 1 == len(options):
        raise UsageError("--accelerate_config needs a value")
    import trl

    given, shipped = Path(options[at + 1]), Path(trl.__file__).parent / "accelerate_configs"
    file = given if given.is_file() else shipped / f"{given}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(known.stem for known in shipped.glob("*.yaml")))
        raise UsageError(f"--accelerate_config must be a file or one of {names}, got {given}")
    return ["--config_file", str(file), *options[:at], *options[at + 2 :]]


if __name__ == "__main__":
    run_script(sys.argv.pop(1))
