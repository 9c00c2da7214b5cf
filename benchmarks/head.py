"""The head: from hidden states to a DPO loss and its gradients, ours per plan against everyone.

    python -m benchmarks.head --shape cpu-bar --rounds 5
    python -m benchmarks.head --growth --shape cpu-bar

A provider that computes wrong numbers prints no speed. `error` is the largest error of token log-probs (or, where a
provider gives none, of the loss) against fp64, `gradient_error` that of d_hidden relative to its largest entry.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast import linear_preference_loss, linear_token_logps, sequence_logps
from dpo_fast.ops.plan import DEFAULT_TILE_MIB

from .measure import interleaved, peak_mib, save, table

BETA = 0.1
# name -> N tokens, pairs, H, V, dtype, soft-cap
SHAPES = {
    "cpu-bar": (1024, 4, 1024, 32_000, torch.float32, None),
    "cpu-tiny": (64, 2, 32, 501, torch.float32, None),
    "qwen3-0.6b-cpu": (256, 2, 1024, 151_936, torch.float32, None),
    "llama3-8b-cpu": (128, 2, 1024, 128_256, torch.float32, None),
    "gemma2-2b-cpu": (128, 2, 576, 256_000, torch.float32, 30.0),
    "llama3-8b": (8192, 16, 4096, 128_256, torch.bfloat16, None),
    "bar": (8192, 16, 4096, 131_072, torch.bfloat16, None),
    "qwen3-0.6b": (8192, 16, 1024, 151_936, torch.bfloat16, None),
    "gemma2-2b": (8192, 16, 2304, 256_000, torch.bfloat16, 30.0),
}


@dataclass
class Problem:
    """One batch of pairs, tokens pair by pair, chosen before rejected, all sequences of one length."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ids: Tensor
    pairs: int
    softcap: float | None

    @classmethod
    def make(cls, N, pairs, H, V, dtype, softcap, device) -> "Problem":
        torch.manual_seed(0)
        length = N // (2 * pairs)
        hidden = torch.randn(2 * pairs * length, H, device=device).to(dtype)
        weight = (torch.randn(V, H, device=device) * (2 / math.sqrt(H))).to(dtype)
        ids = torch.arange(2 * pairs, device=device).view(2, pairs).T.reshape(-1).repeat_interleave(length)
        labels = torch.randint(V, (len(ids),), device=device)
        return cls(hidden, weight, labels, ids, pairs, softcap)

    @property
    def reference(self) -> Tensor:
        return torch.zeros(2 * self.pairs, device=self.hidden.device)

    def loss(self, logps: Tensor) -> Tensor:
        """DPO from token log-probs; the reference is 0."""
        chosen, rejected = sequence_logps(logps, self.ids, 2 * self.pairs).tensor_split(2)
        return F.softplus(-BETA * (chosen - rejected)).mean()

    def rows(self) -> tuple[Tensor, Tensor]:
        """Hidden (2P, T, H) and labels (2P, T), chosen first: what fused DPO losses take."""
        order = self.ids.argsort(stable=True)
        shape = (2 * self.pairs, -1)
        return self.hidden[order].view(*shape, self.hidden.shape[1]), self.labels[order].view(shape)


# --- providers: (problem, hidden, weight) -> token log-probs (N,), or a loss () ------------------------------------


def eager(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    if p.softcap:
        logits = p.softcap * torch.tanh(logits / p.softcap)
    return logits.log_softmax(-1).gather(1, p.labels[:, None])[:, 0]


def ours(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    """score and frozen; with a trained head, recompute."""
    return linear_token_logps(hidden, weight, p.labels, logit_softcap=p.softcap)


def ours_fused(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    """pairwise or pending where the head trains."""
    out = linear_preference_loss(
        hidden, weight, p.labels, p.ids, p.pairs, reference_logps=p.reference, beta=BETA, logit_softcap=p.softcap
    )
    return out.loss


def torch_linear_cross_entropy(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, p.labels, reduction="none", options=options)


def trl(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, p.labels, 1.0, 32_768, p.softcap, 1.0, ("log_probs",))[0]


def cut_cross_entropy(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce_exact" if hidden.is_cuda else "torch_compile"
    return -linear_cross_entropy(hidden, weight, p.labels, softcap=p.softcap, reduction="none", impl=impl)


def liger_dpo(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    rows, labels = p.rows()
    if hidden.requires_grad:  # rows() gathers the problem's own hidden states
        order = p.ids.argsort(stable=True)
        rows = hidden[order].view(rows.shape)
    reference = torch.zeros_like(rows)  # a uniform reference: its log-ratios cancel
    head = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=True)
    return head(weight, rows, labels, None, reference, weight.detach())[0]


_compiled: dict[str, Callable] = {}


def compiled_eager(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    if "eager" not in _compiled:
        _compiled["eager"] = torch.compile(eager)
    return _compiled["eager"](p, hidden, weight)


def providers(p: Problem) -> dict[str, Callable]:
    """Those that can run here, by name; a missing one is printed with its reason."""
    found: dict[str, Callable] = {
        "ours": ours,
        "ours-fused": ours_fused,
        "eager": eager,
        "compiled-eager": compiled_eager,
    }
    candidates = {
        "torch-linear-ce": (torch_linear_cross_entropy, lambda: F.linear_cross_entropy),
        "trl-1.16": (trl, lambda: __import__("trl.kernels")),
        "cut-cross-entropy": (cut_cross_entropy, lambda: __import__("cut_cross_entropy")),
        "liger-dpo": (liger_dpo, lambda: __import__("liger_kernel.chunked_loss")),
    }
    for name, (function, probe) in candidates.items():
        if p.softcap and name in ("torch-linear-ce", "liger-dpo"):
            print(f"{name}: left out, it has no soft-cap")
            continue
        try:
            probe()
        except (ImportError, AttributeError) as reason:
            print(f"{name}: left out, {reason}")
            continue
        found[name] = function
    return found


# --- what is timed -------------------------------------------------------------------------------------------------


def floors(p: Problem) -> dict[str, Callable[[], object]]:
    """The bare GEMMs of the plans, in the largest tiles that gain anything (1,024 rows on CPU, 4,096 elsewhere), which
    exist before the clock starts."""
    N, V = p.hidden.shape[0], p.weight.shape[0]
    rows = min(N, 1024 if p.hidden.device.type == "cpu" else 4096)
    tile = torch.empty(rows, V, dtype=p.hidden.dtype, device=p.hidden.device)
    d_hidden, d_weight = torch.empty_like(p.hidden), torch.zeros_like(p.weight)

    def run(gemms: int) -> None:
        for start in range(0, N, rows):
            h = p.hidden[start : start + rows]
            z = torch.mm(h, p.weight.T, out=tile[: len(h)])
            if gemms > 1:
                torch.mm(z, p.weight, out=d_hidden[start : start + rows])
            if gemms > 2:
                torch.mm(z.T, h, out=d_weight) if start == 0 else torch.addmm(d_weight, z.T, h, out=d_weight)

    return {f"floor-{k}-gemm": (lambda k=k: run(k)) for k in (1, 2, 3)}


def case(p: Problem, provider: Callable, mode: str) -> Callable[[], tuple]:
    """mode: score (no gradient), frozen (hidden alone), trained (hidden and weight)."""

    def run():
        hidden, weight = p.hidden.detach(), p.weight.detach()
        if mode == "score":
            with torch.no_grad():
                return provider(p, hidden, weight), None, None
        hidden = hidden.requires_grad_()
        weight = weight.requires_grad_(mode == "trained")
        out = provider(p, hidden, weight)
        (out if out.ndim == 0 else p.loss(out)).backward()
        return out.detach(), hidden.grad, weight.grad

    return run


class Gate:
    """fp64 truth, a few rows of tokens at a time; providers must come within a tenth of a percent of eager's kind."""

    def __init__(self, p: Problem):
        self.p = p
        parts = [eager_fp64(p, slice(start, start + 64)) for start in range(0, p.hidden.shape[0], 64)]
        self.logps = torch.cat(parts)
        self.loss = p.loss(self.logps)
        tokens = self.logps.clone().requires_grad_()
        (self.slopes,) = torch.autograd.grad(p.loss(tokens), tokens)
        rows = slice(0, min(8, p.hidden.shape[0]))
        hidden = p.hidden[rows].double().requires_grad_()
        z = transformed(p, hidden @ p.weight.double().T)
        (z.log_softmax(-1).gather(1, p.labels[rows, None])[:, 0] * self.slopes[rows]).sum().backward()
        self.rows, self.d_hidden = rows, hidden.grad

    def errors(self, out: Tensor, d_hidden: Tensor | None) -> dict[str, float]:
        truth = self.loss if out.ndim == 0 else self.logps
        found = {"error": (out.double() - truth).abs().max().item()}
        if d_hidden is not None:
            scale = self.d_hidden.abs().max()
            found["gradient_error"] = ((d_hidden[self.rows].double() - self.d_hidden).abs().max() / scale).item()
        half = self.p.hidden.dtype != torch.float32
        bounds = {"error": 0.5 if half else 1e-3, "gradient_error": 0.05 if half else 1e-3}
        for name, value in found.items():
            if not value <= bounds[name]:
                raise AssertionError(f"{name} {value:.3g} is above {bounds[name]}")
        return found


def transformed(p: Problem, z: Tensor) -> Tensor:
    return p.softcap * torch.tanh(z / p.softcap) if p.softcap else z


def eager_fp64(p: Problem, rows: slice) -> Tensor:
    z = transformed(p, p.hidden[rows].double() @ p.weight.double().T)
    return z.log_softmax(-1).gather(1, p.labels[rows, None])[:, 0]


MODES = {"score": 1, "frozen": 2, "trained": 3}


def bench(shape: str, rounds: int, modes=tuple(MODES), only=None) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p = Problem.make(*SHAPES[shape], device)
    gate, rows = Gate(p), []
    for mode in modes:
        cases = {}
        measured = {}
        for name, provider in providers(p).items():
            if (only and name not in only) or (name == "ours-fused" and mode != "trained"):
                continue
            run = case(p, provider, mode)
            try:
                out, d_hidden, _ = run()
                measured[name] = gate.errors(out, d_hidden)
            except (AssertionError, RuntimeError, NotImplementedError, TypeError) as reason:
                print(f"{name} ({mode}): no speed, {type(reason).__name__}: {str(reason).splitlines()[0][:160]}")
                continue
            cases[name] = run
            measured[name]["peak_mib"] = peak_mib(run)
        floor = f"floor-{MODES[mode]}-gemm"
        timings = interleaved({floor: floors(p)[floor], **cases}, rounds)
        unit = "wall_median_ms" if device == "cuda" else "processor_median_ms"
        base = timings[floor].summary()[unit]
        for name, timing in timings.items():
            summary = timing.summary()
            rows.append(
                {"mode": mode, "provider": name, **summary, "to_floor": summary[unit] / base} | measured.get(name, {})
            )
            gradients = {"score": 0, "frozen": p.hidden.nbytes, "trained": p.hidden.nbytes + p.weight.nbytes}[mode]
            if name in measured:
                rows[-1]["beyond_gradients_mib"] = rows[-1]["peak_mib"] - gradients / 2**20
    N, pairs, H, V, dtype, softcap = SHAPES[shape]
    sizes = dict(N=N, pairs=pairs, H=H, V=V, dtype=str(dtype)[6:], softcap=softcap)
    return {"shape": shape, **sizes, "rows": rows}


def growth(shape: str, tokens: list[int]) -> dict:
    """Time and memory per plan as N grows at fixed H and V, and as V grows at the smallest N."""
    _, _, H, V, dtype, softcap = SHAPES[shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for N, columns in [*((n, V) for n in tokens), *((tokens[0], v) for v in (V // 4, V // 2, 2 * V, 4 * V))]:
        p = Problem.make(N, max(2, N // 256), H, columns, dtype, softcap, device)
        for plan, mode, provider in (
            ("score", "score", ours),
            ("frozen", "frozen", ours),
            ("pairwise", "trained", ours_fused),
            ("recompute", "trained", ours),
        ):
            run = case(p, provider, mode)
            timing = interleaved({plan: run}, 1, warmup=0)[plan].summary()
            gradients = {"score": 0, "frozen": p.hidden.nbytes, "trained": p.hidden.nbytes + p.weight.nbytes}[mode]
            beyond = peak_mib(run) - gradients / 2**20
            rows.append({"plan": plan, "N": N, "V": columns, **timing, "beyond_gradients_mib": beyond})
            print(table(rows[-1:], ["plan", "N", "V", "processor_median_ms", "beyond_gradients_mib"]).splitlines()[-1])
    return {"shape": shape, "H": H, "dtype": str(dtype)[6:], "tile_mib": DEFAULT_TILE_MIB, "rows": rows}


def plot_growth(result: dict, path) -> None:
    """Memory beyond inputs and returned gradients against N and against V; what full fp32 logits would take, beside."""
    plt = pyplot()
    if plt is None:
        return
    rows = result["rows"]
    smallest, V = rows[0]["N"], rows[0]["V"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for axis, name, fixed in ((axes[0], "N", {"V": V}), (axes[1], "V", {"N": smallest})):
        chosen = [row for row in rows if all(row[key] == value for key, value in fixed.items())]
        for plan in dict.fromkeys(row["plan"] for row in chosen):
            points = sorted((row[name], row["beyond_gradients_mib"]) for row in chosen if row["plan"] == plan)
            axis.plot(*zip(*points, strict=True), marker="o", label=f"ours, {plan}")
        sizes = sorted({row[name] for row in chosen})
        other = fixed.get("V") or fixed.get("N")
        axis.plot(sizes, [size * other * 4 / 2**20 for size in sizes], "--", color="#999999", label="fp32 logits, once")
        axis.axhline(1.1 * result["tile_mib"], color="black", linewidth=0.8, label="tile budget + 10 %")
        axis.set(xscale="log", yscale="log", title=f"{name} grows, {next(iter(fixed))} = {other:,}")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel("tokens N" if name == "N" else "vocabulary V")
    axes[0].set_ylabel("MiB beyond inputs and gradients")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def pyplot():
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot
    except ImportError:
        print("no plot: matplotlib is not installed (pip install dpo_fast[examples])")
        return None
    return matplotlib.pyplot


def plot(result: dict, path) -> None:
    """Bars of time relative to the floor; skipped with a line where matplotlib is missing."""
    plt = pyplot()
    if plt is None:
        return
    modes = list(dict.fromkeys(row["mode"] for row in result["rows"]))
    figure, axes = plt.subplots(1, len(modes), figsize=(4.5 * len(modes), 3.6), squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=True):
        rows = sorted((r for r in result["rows"] if r["mode"] == mode), key=lambda r: r["to_floor"])
        colours = [
            "#999999" if r["provider"].startswith("floor") else "#2a7f62" if "ours" in r["provider"] else "#c9b37e"
            for r in rows
        ]
        axis.barh([r["provider"] for r in rows], [r["to_floor"] for r in rows], color=colours)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(mode)
        axis.set_xlabel("time / bare GEMMs of the plan")
        axis.invert_yaxis()
    figure.suptitle(f"{result['shape']}: N={result['N']} H={result['H']} V={result['V']} {result['dtype']}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.head", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="bar" if torch.cuda.is_available() else "cpu-bar")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--only", nargs="+", help="providers")
    parser.add_argument("--growth", action="store_true", help="the growth curve instead")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 32_768])
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.growth:
        result, name = growth(arguments.shape, arguments.tokens), f"head-growth-{arguments.shape}"
        columns = ["plan", "N", "V", "wall_median_ms", "processor_median_ms", "beyond_gradients_mib"]
    else:
        result = bench(arguments.shape, arguments.rounds, arguments.modes, arguments.only)
        name = f"head-{arguments.shape}"
        columns = ["provider", "mode", "wall_median_ms", "processor_median_ms", "processor_min_ms", "to_floor"]
        columns += ["peak_mib", "beyond_gradients_mib", "error", "gradient_error"]
    print(table(result["rows"], columns))
    if not arguments.no_save:
        path = save(name, result)
        (plot_growth if arguments.growth else plot)(result, path.with_suffix(".png"))
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
