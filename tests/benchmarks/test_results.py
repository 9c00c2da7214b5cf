"""Benchmarks measure what they say, refuse wrong results, and run from the root; no time decides anything here."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_wheels_are_listed_with_their_reasons():
    command = ["bash", str(ROOT / "benchmarks" / "wheels.sh")]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True)
    assert listed.returncode == 0 and "needed    dill: datasets needs it" in listed.stdout
    assert "quack     quack-kernels: a head to compare with" in listed.stdout
    assert subprocess.run(command, capture_output=True).returncode == 2


@pytest.mark.parametrize("mib, status, said", [(1, 0, "5120 KiB  in all"), (20, 1, "102400 KiB  in all")])
def test_wheels_that_do_not_travel_at_once_are_told_and_a_large_one_is_cut(tmp_path, mib, status, said):
    """A stand-in for pip writes a wheel of that size for each package, and one of 100 MiB."""
    pip = tmp_path / "python"
    pip.write_text(
        f"""#!/usr/bin/env bash
        cd {tmp_path}/wheels
        for word in "$@"; do case $word in
            *cu13) truncate -s 100M $word.whl ;;
            datasets* | dill | multiprocess | trl* | liger*) truncate -s {mib}M $word.whl ;;
        esac; done
        """.replace("        #!", "#!", 1)
    )
    pip.chmod(0o755)
    command = ["bash", str(ROOT / "benchmarks" / "wheels.sh"), str(tmp_path / "wheels"), "--quack"]
    run = subprocess.run(command, env={**os.environ, "PYTHON": str(pip)}, capture_output=True, text=True)
    assert run.returncode == status and said in run.stdout, run.stdout + run.stderr
    assert "cut into 3 pieces" in run.stdout and not list((tmp_path / "wheels").glob("*cu13*"))
    sizes = [path.stat().st_size >> 20 for path in sorted((tmp_path / "wheels.parts").iterdir())]
    assert sizes == [48, 48, 4]


def test_providers_take_turns_and_peaks_are_peaks():
    from benchmarks.measure import interleaved, peak_mib

    order = []
    timings = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3 and timings["a"].summary()["rounds"] == 2
    if not torch.cuda.is_available():
        assert peak_mib(lambda: (torch.zeros(1 << 18), torch.zeros(1 << 19))[0].sum()) == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("name", ["ours-wrong", "eager-wrong"])
@pytest.mark.parametrize("dtype, off", [(torch.float32, 0.01), (torch.bfloat16, 0.5)], ids=["fp32", "bf16"])
def test_no_speed_for_a_wrong_result(monkeypatch, capsys, dtype, off, name):
    from benchmarks import head

    monkeypatch.setitem(head.SHAPES, "small", (512, 2, 32, 501, dtype, None))
    wrong = lambda *x: head.ours(*x) + off  # noqa: E731
    candidates = {"ours": head.ours, "eager": eager, name: wrong}
    monkeypatch.setattr(head, "providers", lambda *_: candidates)
    result = head.bench("small", rounds=1, modes=("score", "frozen"))
    assert {row["provider"] for row in result["rows"]} == {"floor-1-gemm", "floor-2-gemm", "ours", "eager"}
    assert f"{name} (score): no speed, AssertionError: logps" in capsys.readouterr().out


def eager(p, hidden, weight):
    from benchmarks import head_providers

    return head_providers.eager(p, hidden, weight)


@pytest.mark.parametrize("what", ["d_hidden", "d_weight"])
def test_no_speed_for_a_wrong_gradient(what):
    from benchmarks import head_gate, head_providers

    p = head_providers.Problem.make(512, 2, 32, 501, torch.float32, 5.0, "cpu")
    gate = head_gate.Gate(p)
    out, *gradients = head_providers.case(p, head_providers.eager, "trained")()
    assert gate.errors("theirs", out, *gradients)["gradient_error"] < 1e-5
    gradients["d_hidden d_weight".split().index(what)] *= 1.01
    with pytest.raises(AssertionError, match=what):
        gate.errors("theirs", out, *gradients)


def test_ours_is_held_to_logits_in_fp32_and_a_loss_to_its_tokens():
    from benchmarks import head_gate, head_providers

    p = head_providers.Problem.make(512, 2, 32, 501, torch.bfloat16, None, "cpu")
    gate = head_gate.Gate(p)
    rounded = head_providers.eager(p, p.hidden, p.weight)
    gate.errors("eager", rounded, None, None)
    with pytest.raises(AssertionError):
        gate.errors("ours", rounded, None, None)
    loss = p.loss(gate.truth.logps).float()
    assert gate.errors("ours-fused", loss, None, None)["error"] < 1e-6
    with pytest.raises(AssertionError, match="loss: error 0.001"):
        gate.errors("ours-fused", loss + 1e-3, None, None)


@pytest.mark.parametrize(
    "name, needs",
    [("eager", "torch"), ("trl-1.16", "trl.kernels"), ("liger-dpo", "liger_kernel"), ("liger-flsce", "liger_kernel")],
)
def test_products_are_as_many_as_is_said(name, needs):
    from torch.utils._python_dispatch import TorchDispatchMode

    from benchmarks import head_providers

    pytest.importorskip(needs)

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm"):
                a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
                self.count += 2 * a.numel() * b.shape[-1]
            return op(*args, **(kwargs or {}))

    N, H, V = 512, 32, 501
    p = head_providers.Problem.make(N, 2, H, V, torch.float32, None, "cpu")
    provider = {"eager": head_providers.eager, **{k: v for k, (v, _) in head_providers.OTHERS.items()}}[name]
    for mode, gemms in zip(head_providers.MODES, head_providers.facts_of(name).gemms, strict=True):
        with Products() as products:
            head_providers.case(p, provider, mode)()
        assert products.count == gemms * 2 * N * H * V, mode


def test_our_products_are_those_of_the_plans():
    from benchmarks.head_providers import facts_of
    from dpo_fast.ops.plan import GEMMS

    assert facts_of("ours-256-mib").gemms == tuple(GEMMS[plan] for plan in ("score", "frozen", "recompute"))
    assert facts_of("ours-fused-256-mib").gemms == tuple(GEMMS[plan] for plan in ("score", "frozen", "pairwise"))


def test_who_carries_one_number_is_held_to_the_likelihood():
    from benchmarks import head, head_providers

    p = head_providers.Problem.make(512, 2, 32, 501, torch.float32, None, "cpu")
    gates = head.Gates(p)
    assert gates.of("ours-fused-256-mib") is gates.of("trl-1.16") is gates.pairs
    likelihood = gates.of("quack")

    def summed(p, hidden, weight):
        return -head_providers.eager(p, hidden, weight).sum()

    def of_pairs(p, hidden, weight):
        return head_providers.Problem.loss(p, head_providers.eager(p, hidden, weight))

    likelihood.errors("quack", *head_providers.case(likelihood.p, summed, "trained")())
    with pytest.raises(AssertionError):
        likelihood.errors("quack", *head_providers.case(likelihood.p, of_pairs, "trained")())
    rows = head.measure(gates, {"quack": summed, "eager": head_providers.eager}, "frozen", rounds=1)
    assert [(row.get("gemms"), row.get("carries")) for row in rows] == [
        (None, None), (2, head_providers.ONE), (2, head_providers.TOKENS)
    ]  # fmt: skip


def test_ratios_are_of_rounds():
    from benchmarks.measure import Timing, ratios

    noisy, base = Timing(wall_ms=[2.0, 20.0, 6.0]), Timing(wall_ms=[1.0, 10.0, 2.0])
    assert ratios(noisy, base) == {"median": 2.0, "min": 2.0, "max": 3.0}


@pytest.fixture
def record(monkeypatch, tmp_path):
    """Makes a Record of `level1` that finds these commits, one after the other; `changed`: what differs in its code."""
    from benchmarks import record

    def make(*commits: str, changed: str | None = None, **knobs):
        left = iter(commits)
        monkeypatch.setattr(record, "commit_of", lambda paths: next(left))
        monkeypatch.setattr(record, "reason_against", lambda commit, paths: changed)
        return record.Record("level1", ["--N", "4", "--allow-dirty"], folder=tmp_path, **knobs)

    return make


def test_results_are_stamped_and_whole(record):
    path = record("abc", "abc").save("some", {"rows": [1]})
    written = json.loads(path.read_text())
    assert written["rows"] == [1] and written["versions"]["torch"] == torch.__version__ and written["device"]
    assert (written["commit"], written["command"]) == ("abc", "python -m benchmarks.level1 --N 4")
    assert written["complete"] is True and [p.name for p in path.parent.iterdir()] == ["some.json"]


def test_uncommitted_code_is_not_measured_unless_told(record):
    from benchmarks.record import Refused

    with pytest.raises(Refused, match="uncommitted changes"):
        record("abc-dirty")
    path = record("abc-dirty", allow_dirty=True).save("some", {}, complete=False)
    assert json.loads(path.read_text())["commit"] == "abc-dirty"
    assert record(save=False).save("some", {}) is None


def test_code_that_changes_under_a_measurement_is_dirty(record, capsys):
    for now in ("abc-dirty", "def"):
        path = record("abc", now, changed="older than the code").save("some", {})
        assert json.loads(path.read_text())["commit"] == "abc-dirty" and "changed while" in capsys.readouterr().out
    path = record("abc", "def").save("some", {})  # a commit of other files
    assert json.loads(path.read_text())["commit"] == "abc" and "changed while" not in capsys.readouterr().out


def test_a_benchmark_refuses_before_it_measures(monkeypatch, capsys):
    from benchmarks import level1, record

    monkeypatch.setattr(record, "commit_of", lambda paths: "abc-dirty")
    monkeypatch.setattr(level1, "bench", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        level1.main(["--N", "4"])
    assert stopped.value.code == 2 and "commit them first, or add --no-save or --allow-dirty" in capsys.readouterr().err


def test_a_part_that_is_known_is_saved_at_once(record):
    from benchmarks import level1

    seen = []
    level1.bench(4, 64, torch.float32, 1, lambda result, complete: seen.append((len(result["rows"]), complete)))
    assert seen == [(2, False), (3, False), (4, False), (5, True)]


def test_without_a_repository_the_commit_can_be_given(monkeypatch, tmp_path):
    from benchmarks import provenance

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv(provenance.GIVEN, raising=False)
    with pytest.raises(provenance.NoHistory, match="not a git repository"):
        provenance.commit_of(("kernels",), tmp_path)
    monkeypatch.setenv(provenance.GIVEN, "0123456789ab")
    assert provenance.commit_of(("kernels",), tmp_path) == "0123456789ab"
    monkeypatch.setenv(provenance.GIVEN, "main")
    with pytest.raises(provenance.NoHistory, match="must be a commit"):
        provenance.commit_of(("kernels",), tmp_path)


@pytest.mark.parametrize("kernel", ["fwd", "bwd"])
def test_the_sweep_times_what_the_rule_would_take(kernel):
    from benchmarks import sweep
    from dpo_fast.kernels import token_logps

    fields = sweep.NAMES[kernel][1]
    rule = {"fwd": token_logps.forward_config(131_072, 2), "bwd": token_logps.backward_config(131_072)}[kernel]
    candidates = {"fwd": sweep.forward_candidates, "bwd": sweep.backward_candidates}[kernel]()
    assert [rule[field] for field in fields] in [[c[field] for field in fields] for c in candidates]


@pytest.mark.parametrize("name", ["gemm", "attention"])
def test_tables_have_a_line_of_each_part(name, capsys):
    module = __import__(f"benchmarks.{name}", fromlist=["main"])
    assert module.main(["--no-save"]) == 0
    out = capsys.readouterr().out
    if name == "gemm":
        assert all(f"role {role}, rows {n}" in out for role in module.ROLES for n in (16, 32))
    else:
        assert "case tiny, implementation eager" in out
        # No backward on CPU in some versions of torch, a slow one in others
        assert "tiny, flex: no speed" in out or "case tiny, implementation flex" in out
