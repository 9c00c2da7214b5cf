"""Pictures of the results of `benchmarks.head`."""


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
