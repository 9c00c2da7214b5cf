"""What a GPU can tell, in one command and within the minutes given: correctness, whole steps, then their parts.

    bash benchmarks/gpu.sh --minutes 10                  on a machine with a GPU
    bash benchmarks/gpu.sh --minutes 10 --wheels DIR     with packages brought along (wheels.sh), installed beside
    bash benchmarks/gpu.sh --dry-run                     the stages at tiny sizes on a CPU, in Triton's interpreter

Parts run in the order of gpu_stages.py as far as they fit; what does not is said. A second call goes on: what is done
by this commit on this device is not run again, what failed comes last. results/<device>/ holds a file of each part,
gpu.json with the state of all, logs/, and index.html with a table and plots; beside it is the folder as one .tgz to
bring back.

Needs torch, triton, transformers and pytest; no network. Status 1 where a part failed, 2 where none could begin.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

from . import gpu_page
from .facts import lines_of, reason_against
from .gpu_stages import STAGES, Part
from .provenance import GIVEN, ROOT, NoHistory, checked_out

PYTHON = os.environ.get("PYTHON", sys.executable)
LEAST_S = 1.0  # of a part that is told to take too long
GRACE_S = 5  # between asking a part to stop and stopping it
NAMES = [name for stage in STAGES for name in dict.fromkeys((stage.name, *(part.name for part in stage.parts)))]


def parse(argv: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in NAMES]:
            raise argparse.ArgumentTypeError(f"there is no stage or part '{unknown[0]}'; there are {', '.join(NAMES)}")
        return text.split(",")

    def folder(text: str) -> Path:
        if not Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder '{text}'")
        return Path(text).resolve()

    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__, formatter_class=kind)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU; saves nothing without --out")
    parser.add_argument("--wheels", type=folder, help="packages to install beside, for this run")
    parser.add_argument("--commit", help="of this checkout, where it travels without its repository")
    parser.add_argument("--allow-dirty", action="store_true", help="measure uncommitted code; results say so")
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), help="folder of the results")
    parser.add_argument("--only", type=names, default=[], metavar="NAME,...", help="these stages or parts alone")
    parser.add_argument("--again", action="store_true", help="run what is done, too")
    parser.add_argument("--fail", type=names, default=[], metavar="NAME,...", help="these fail, to see it noticed")
    parser.add_argument("--stall", type=names, default=[], metavar="NAME,...", help="these take too long, likewise")
    a = parser.parse_args(argv)
    a.parser = parser
    return a


# --- one part --------------------------------------------------------------------------------------------------------


def execute(command: list[str], limit: float, environment: dict[str, str], log: Path) -> int | None:
    """Run `command`, its output here and in `log`; its exit status, or None where it was stopped after `limit` seconds.

    It is the leader of its own group, which ends with it: workers of a part that is stopped would hold the memory."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    late = threading.Event()

    def stop():
        late.set()
        end_group(process, signal.SIGTERM)
        kill.start()

    kill = threading.Timer(GRACE_S, lambda: end_group(process, signal.SIGKILL))
    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        with log.open("w", encoding="utf-8") as file:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
        status = process.wait()
    finally:
        timer.cancel()
        kill.cancel()
        end_group(process, signal.SIGKILL)
    return None if late.is_set() else status


def end_group(process: subprocess.Popen, how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


# --- all parts -------------------------------------------------------------------------------------------------------


class Run:
    def __init__(self, arguments: argparse.Namespace, facts: dict, commit: str, folder: Path, environment: dict):
        self.a, self.facts, self.commit, self.folder, self.environment = arguments, facts, commit, folder, environment
        self.end = time.monotonic() + 60 * arguments.minutes
        self.saves = not arguments.dry_run or arguments.out is not None
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        state = folder / "gpu.json"
        self.parts = json.loads(state.read_text(encoding="utf-8"))["parts"] if state.exists() else {}

    def chosen(self) -> list[tuple[str, Part]]:
        """(stage, part) of all that were asked for; those that this commit has failed in come last."""
        only = self.a.only
        found = [
            (stage.name, part)
            for stage in STAGES
            for part in stage.parts
            if (not only or stage.name in only or part.name in only) and (part.dry or not self.a.dry_run)
        ]
        return sorted(found, key=lambda each: self.state_of(each[1]) in ("failed", "stopped"))

    def state_of(self, part: Part) -> str | None:
        found = self.parts.get(part.name, {})
        return found.get("state") if found.get("commit") == self.commit else None

    def is_done(self, part: Part) -> bool:
        """By this commit, on this device, its result file still there and whole."""
        if self.a.again or self.commit.endswith("-dirty") or self.state_of(part) != "done":
            return False
        if not part.saves or self.a.dry_run:
            return True
        path = self.folder / f"{part.name}.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return bool(result.get("complete")) and result.get("commit") == self.commit

    def command(self, stage: str, part: Part) -> list[str]:
        if stage in self.a.fail or part.name in self.a.fail:
            return [PYTHON, "-c", "import sys; sys.exit('this failure was asked for')"]
        if stage in self.a.stall or part.name in self.a.stall:
            return [PYTHON, "-c", "import time; print('this delay was asked for', flush=True); time.sleep(60)"]
        words = part.dry if self.a.dry_run else part.words
        if "pytest" in words and not self.a.dry_run and "xdist" not in self.facts["missing"]:
            # half of the tests' time is compilation, on one core each
            words = (*words, "-n", str(max(1, min(6, (os.cpu_count() or 1) // 2))))
        if part.saves:
            words = (*words, "--out", str(self.folder.parent)) if self.saves else (*words, "--no-save")
            words += ("--allow-dirty",) if self.saves and (self.a.allow_dirty or self.a.dry_run) else ()
        return [*(() if self.a.dry_run else part.under), PYTHON, *words]

    def note(self, part: Part, state: str, because: str = "", seconds: float = 0.0) -> None:
        """Keep it at once: who is killed next leaves what is known."""
        self.parts[part.name] = {"state": state, "because": because, "seconds": round(seconds, 1)}
        self.parts[part.name] |= {"commit": self.commit, "date": time.strftime("%Y-%m-%d")}
        whole = all(self.state_of(p) == "done" for stage in STAGES for p in stage.parts)
        content = {"device": self.facts["device"], "commit": self.commit, "command": "bash benchmarks/gpu.sh"}
        content |= {"complete": whole, "facts": self.facts, "parts": self.parts}
        draft = self.folder / "gpu.tmp"
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.folder / "gpu.json")

    def one(self, stage: str, part: Part) -> None:
        left = self.end - time.monotonic()
        if self.is_done(part):
            print(f"== {part.name}: done before by this commit")
        elif reason := reason_against(part, self.facts, on_gpu=not self.a.dry_run):
            self.note(part, "left out", reason)
            print(f"== {part.name}: left out, {reason}")
        elif part.seconds > left and not self.a.dry_run or left <= 0:
            self.note(part, "not reached", f"it takes about {part.seconds} s, {max(left, 0):.0f} were left")
            print(f"== {part.name}: no time, {self.parts[part.name]['because']}")
        else:
            self.run(stage, part, left)

    def run(self, stage: str, part: Part, left: float) -> None:
        stalls = stage in self.a.stall or part.name in self.a.stall
        limit = LEAST_S if stalls else left if self.a.dry_run else min(left, 2 * part.seconds)
        print(f"== {part.name}: {limit:.0f} s at most", flush=True)
        start = time.monotonic()
        environment = self.environment
        if part.under:  # a sanitizer sees allocations of the driver, not those that torch makes out of them
            environment = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        status = execute(self.command(stage, part), limit, environment, self.logs / f"{part.name}.txt")
        seconds = time.monotonic() - start
        if status == 0:
            self.note(part, "done", seconds=seconds)
            print(f"== {part.name}: done in {seconds:.0f} s", flush=True)
        elif status is None:
            self.note(part, "stopped", f"its {limit:.0f} s were up; what it saved stays", seconds)
            print(f"== {part.name}: STOPPED, {self.parts[part.name]['because']}", flush=True)
        else:
            self.note(part, "failed", f"exit status {status}, see logs/{part.name}.txt", seconds)
            print(f"== {part.name}: FAILED, {self.parts[part.name]['because']}", flush=True)

    def all(self) -> int:
        chosen = self.chosen()
        for stage, part in chosen:
            self.one(stage, part)
        states = {part.name: self.state_of(part) for _, part in chosen}
        self.report(states)
        bad = [name for name, state in states.items() if state in ("failed", "stopped")]
        later = [name for name, state in states.items() if state == "not reached"]
        if later:
            print(f"not reached: {', '.join(later)}; the same command goes on with them")
        if bad:
            print(f"failed: {', '.join(bad)}; the same command tries them again at its end")
            return 1
        print(f"all parts that can run here are done{'' if self.saves else '; a dry run saves nothing'}" * (not later))
        return 0

    def report(self, states: dict) -> None:
        print(gpu_page.text(self.folder, self.parts, states))
        if not self.saves:
            return
        print(f"written to {gpu_page.write(self.folder, self.parts)}")
        archive = self.folder.with_name(f"{self.folder.name}.tgz")
        with tarfile.open(archive, "w:gz") as file:
            file.add(self.folder, arcname=self.folder.name)
        print(f"to bring back: {archive} ({archive.stat().st_size / 1024:.0f} KiB)")


# --- before the first part -------------------------------------------------------------------------------------------


def python_says(*words: str, environment: dict[str, str]) -> str:
    found = subprocess.run([PYTHON, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"gpu.sh: {shlex.join(words)} failed:\n{found.stderr[-2000:]}")
    return found.stdout


def install_beside(wheels: Path, beside: str, environment: dict[str, str]) -> None:
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", beside)
    python_says(*pip, *map(str, sorted(wheels.glob("*.whl"))), environment=environment)
    paths = [beside, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)


def commit_or_refuse(a: argparse.Namespace) -> str:
    try:
        commit = checked_out()
    except NoHistory as reason:
        commit, why = "unknown-dirty", str(reason)
    else:
        why = "uncommitted changes" if commit.endswith("-dirty") else ""
    if why and not (a.allow_dirty or a.dry_run):
        a.parser.error(f"results would not name their code ({why}): commit it, or give --commit or --allow-dirty")
    return commit


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # so that what is stopped has printed
    if a.commit:
        os.environ[GIVEN] = environment[GIVEN] = a.commit
    if a.dry_run:
        environment |= {"TRITON_INTERPRET": "1", "DPO_FAST_IMPL": "torch", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="gpu_") as scratch:
        if a.wheels:
            install_beside(a.wheels, str(Path(scratch) / "site"), environment)
        facts = json.loads(python_says("-m", "benchmarks.facts", environment=environment))
        if not facts["gpus"] and not a.dry_run:
            a.parser.error("torch sees no GPU here; use --dry-run to try the stages on a CPU")
        if facts["gpus"] > 1:  # a Trainer would split its batches among them
            first = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
            environment["CUDA_VISIBLE_DEVICES"] = first or "0"
        commit = commit_or_refuse(a)
        print(f"measuring commit {commit} on {facts['device']}")
        for line in lines_of(facts, on_gpu=not a.dry_run):
            print(line)
        kept = a.out or ROOT / "benchmarks" / "results"
        folder = (Path(scratch) / "results" if a.dry_run and not a.out else kept) / facts["device"]
        status = Run(a, facts, commit, folder, environment).all()
        if not a.dry_run:
            # a bar that is missed is a finding, not a failed part
            subprocess.run(
                [PYTHON, "-m", "benchmarks.bars", "--folder", str(folder)], cwd=ROOT, env=environment, check=False
            )
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended, too
    raise SystemExit(main())
