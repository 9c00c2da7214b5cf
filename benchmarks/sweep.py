"""Block sizes and warps of each kernel, timed: what a table of tuned sizes would be made of. Nothing tunes at run time.

python -m benchmarks.sweep --kernel fwd bwd direction score
"""

import argparse
import ast
import itertools

import torch
import triton

from dpo_fast.kernels import linear_score, token_logps
from dpo_fast.testing import make_logits

from .measure import device_name, interleaved, save, table

# what is swept -> its entry in kernels/tuned.py, and the entry's fields
NAMES = {
    "fwd": ("token_logps_fwd", ("LANES", "num_warps")),
    "bwd": ("token_logps_bwd", ("BLOCK_V", "num_warps")),
    "direction": ("token_logps_direction", ("BLOCK_V", "num_warps")),
    "score": ("linear_score_fwd", ("BLOCK_N", "BLOCK_V", "BLOCK_H", "FOLD_V", "num_warps", "num_stages")),
}


def forward_candidates():
    for lanes, warps in itertools.product((256, 512, 1024, 2048), (4, 8, 16)):
        yield {"LANES": lanes, "num_warps": warps}


def backward_candidates():
    for block, warps in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16)):
        yield {"BLOCK_V": block, "num_warps": warps}


def score_candidates():
    for n, v, h, warps, stages in itertools.product((64, 128), (128, 256), (32, 64), (4, 8), (3, 4)):
        yield {"BLOCK_N": n, "BLOCK_V": v, "FOLD_V": v, "BLOCK_H": h, "num_warps": warps, "num_stages": stages}


def runs(kernel: str, N: int, H: int, V: int, dtype: torch.dtype, device: str):
    """(label, callable) of the rule's choice and of each candidate."""
    knobs = dict(ignore_index=-100, logit_scale=1.0, softcap=None, temperature=1.0)
    labels = torch.randint(V, (N,), device=device)
    names = ("logps", "row_max", "log_sum")
    out = {name: torch.empty(N, device=device) for name in names}
    if kernel == "score":
        hidden, weight = (torch.randn(rows, H, device=device).to(dtype) for rows in (N, V))

        def score(config):
            return lambda: linear_score.linear_score_fwd(hidden, weight, labels, None, out, config=config, **knobs)

        yield "rule", score(None)
        yield from ((str(c), score(c)) for c in score_candidates())
        return
    logits, labels = make_logits(N, V, dtype=dtype, ignored=0.0, device=device)
    rows, d_logits = (1, N, 0, V), torch.empty_like(logits)
    token_logps.token_logps_fwd(logits, rows, labels, out, **knobs)
    d_logps = torch.ones(N, device=device)

    def forward(config):
        def run():
            with replaced("forward_config", config):
                token_logps.token_logps_fwd(logits, rows, labels, out, **knobs)

        return run

    def backward(config):
        def run():
            with replaced("backward_config", config):
                arguments = (logits, d_logits, rows, rows, labels, out["row_max"], out["log_sum"], d_logps)
                token_logps.token_logps_bwd(*arguments, **knobs)

        return run

    def direction(config):
        """Over a tile of its own, again and again: what D looks like as fp32 does not change the time."""

        def run():
            with replaced("backward_config", config):
                over = tile.view(torch.bfloat16)[:, :V]
                token_logps.token_logps_direction(tile, over, labels, out["row_max"], out["log_sum"], d_logps, **free)

        return run

    free = {name: value for name, value in knobs.items() if name != "ignore_index"}
    tile = torch.zeros(N, V, device=device) if kernel == "direction" else None
    make, candidates = {
        "fwd": (forward, forward_candidates),
        "bwd": (backward, backward_candidates),
        "direction": (direction, backward_candidates),
    }[kernel]
    yield "rule", make(None)
    for candidate in candidates():
        if kernel == "fwd":
            candidate["WIDTH"] = 16 // logits.element_size()
        yield str(candidate), make(candidate)


class replaced:
    """A rule of kernels/token_logps.py answers `config` inside; None leaves it as it is."""

    def __init__(self, rule: str, config: dict | None):
        self.rule, self.config, self.original = rule, config, getattr(token_logps, rule)

    def __enter__(self):
        if self.config is not None:
            setattr(token_logps, self.rule, lambda *_, **__: dict(self.config))

    def __exit__(self, *_):
        setattr(token_logps, self.rule, self.original)


def sweep(kernel: str, N: int, H: int, V: int, dtype: torch.dtype, rounds: int) -> list[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = {}
    for label, run in runs(kernel, N, H, V, dtype, device):
        try:
            run()
        except (triton.OutOfResources, ValueError) as reason:
            print(f"{kernel} {label}: left out, {type(reason).__name__}")
            continue
        cases[label] = run
    timings = interleaved(cases, rounds)
    rows = [{"kernel": kernel, "config": label, **timing.summary()} for label, timing in timings.items()]
    return sorted(rows, key=lambda row: row["wall_median_ms"])


def entries(rows: list[dict]) -> dict:
    """The fastest candidate of each kernel that is 3 % faster than its rule, as kernels/tuned.py has it."""
    found = {"device": f"{device_name()}, torch {torch.__version__}, triton {triton.__version__}"}
    for kernel, (name, fields) in NAMES.items():
        times = {row["config"]: row["wall_median_ms"] for row in rows if row["kernel"] == kernel}
        best = min(times, key=times.get, default="rule")
        if best != "rule" and times[best] < 0.97 * times["rule"]:
            config = ast.literal_eval(best)
            found[name] = tuple(config[field] for field in fields)
    return found


def main(argv=None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--N", type=int, default=4096 if cuda else 2)
    parser.add_argument("--H", type=int, default=4096 if cuda else 32)
    parser.add_argument("--V", type=int, default=131_072 if cuda else 512)
    parser.add_argument("--rounds", type=int, default=10 if cuda else 1)
    parser.add_argument("--no-save", action="store_true")
    a = parser.parse_args(argv)
    dtype = torch.bfloat16 if cuda else torch.float32
    rows = [row for kernel in a.kernel for row in sweep(kernel, a.N, a.H, a.V, dtype, a.rounds)]
    print(table(rows, ["kernel", "config", "wall_median_ms", "wall_min_ms"]))
    print("entries for kernels/tuned.py, where they beat the rule:", entries(rows))
    if not a.no_save:
        print(f"written to {save('sweep', {'N': a.N, 'H': a.H, 'V': a.V, 'rows': rows})}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
