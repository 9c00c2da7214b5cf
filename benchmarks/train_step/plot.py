"""The picture of a result of `benchmarks.train_step`: seconds, memory, curves."""

from pathlib import Path

COLOURS = {"trl": "#c9b37e", "trl-compact": "#e0d3b0", "dpo_fast.trl": "#7fb39f", "FastDPOTrainer": "#2a7f62"}
OTHER = "#b0b0b0"
NAMES = {
    "trl": "TRL's DPOTrainer",
    "trl-compact": "TRL's, head on completions",
    "dpo_fast.trl": "dpo_fast.trl.DPOTrainer",
    "FastDPOTrainer": "FastDPOTrainer",
}


def plot(result: dict, path: Path) -> None:
    """Write it to `path`; skipped with a line where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed (pip install dpo_fast[examples])")
        return
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2))
    rows = result["rows"]
    names = [NAMES.get(row["provider"], row["provider"]) for row in rows]
    colours = [COLOURS.get(row["provider"], OTHER) for row in rows]
    clock = "wall" if "peak_device_mib" in rows[0] else "processor"
    middle = [row[f"{clock}_s"] for row in rows]
    spread = [[row[f"{clock}_s"] - row[f"{clock}_min_s"] for row in rows]]
    spread += [[row[f"{clock}_max_s"] - row[f"{clock}_s"] for row in rows]]
    axes[0].barh(names, middle, xerr=spread, color=colours)
    axes[0].set_title(f"{clock} seconds per step (median, range)")
    axes[1].barh(names, [row["peak_mib"] / 1024 for row in rows], color=colours)
    axes[1].set_title("peak memory, GiB")
    axes[1].set_yticklabels([])
    for axis in axes[:2]:
        axis.invert_yaxis()
    for axis, curve in zip(axes[2:], ("loss", "grad_norm"), strict=True):
        for width, (provider, values) in zip((6, 4, 2.5, 1), result["curves"].items(), strict=False):
            axis.plot(
                range(1, len(values[curve]) + 1), values[curve], color=COLOURS.get(provider, OTHER), linewidth=width
            )
        axis.set_title(f"{curve.replace('_', ' ')} by step")
    figure.suptitle(
        f"{result['shape']}, {result['mix']} mix, {result['mode']}, {result['pairs']} pairs per step, {result['dtype']}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
