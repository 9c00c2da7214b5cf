"""Reports of training runs as HTML.

record.py    what is kept of a run: a dict, results.json
callback.py  ReportCallback, which keeps it and writes both files while a Trainer trains
run.py       the page of one run; compare.py: of several, side by side
page.py      the parts of a page; charts.py: charts as data; svg.py and png.py draw them
files.py     files that appear whole or not at all
"""


def __getattr__(name: str):
    if name == "ReportCallback":  # needs transformers, which the other parts do without
        from .callback import ReportCallback

        return ReportCallback
    raise AttributeError(f"module 'dpo_fast.report' has no attribute {name!r}")
