"""The results of the study: from rows, one JSON file per run, to tables, figures, verdicts and a page.

    load.py        rows of a size, grouped by label over seeds
    contrasts.py   differences with intervals, paired by seed and by question
    studies.py     which rows belong to which study, and what they are compared with
    tables.py      tables, for the console and as Markdown
    marks.py       colours and axes of the figures, readable on light and dark pages
    plots.py       the figures
    paper.py       the paper's claims, and its numbers against each other
    claims.py      a verdict for each claim
    size.py        the sizes of a run that were tried, on validation scenes
    rates.py       the learning rates that were tried, on validation scenes
    page.py        docs/study
    command.py     `python -m study table`, `plots` and `page`

Nothing here trains or scores: whatever a table, a figure or a verdict says follows from the rows alone.
"""
