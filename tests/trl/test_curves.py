"""benchmarks/curves.py: one quick row of it, and what it says of others."""

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

from benchmarks import curves


def test_a_row():
    row = curves.measure("mistral", "base")
    assert row.layout == "shared_prefix" and len(row.differences) == 4 and not row.note
    assert row.off <= curves.LIMIT < 1e-3 < row.moved


@pytest.mark.parametrize(
    "row, bad",
    [
        (curves.Row("llama", "base", differences={"fast loss": 5e-7}), False),
        (curves.Row("llama", "base", differences={"fast loss": 6e-7}), True),
        (curves.Row("llama", "base", differences={"fast loss": float("nan")}), True),
        (curves.Row("llama", "base", differences={"fast loss": 6e-7}, limit=1e-6, note="a reason"), False),
        (curves.Row("llama", "base", differences={"fast loss": 2e-6}, limit=1e-6, note="a reason"), True),
        (curves.Row("llama", "base", note="ValueError: no such model"), True),
    ],
)
def test_the_status(monkeypatch, capsys, row, bad):
    monkeypatch.setattr(curves, "measure", lambda name, mode: row)
    assert curves.main(["llama", "--modes", "base"]) == bad
    assert f"1 rows, {int(bad)} of them off" in capsys.readouterr().out
