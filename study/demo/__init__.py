"""The shortest form of the study: a few runs with one seed, their intervals, and a page about them.

settings.py     which runs, and how small
run.py          all of it in order (`python -m study`)
inspection.py   what is kept of each trained model: answers, expert weights, context vectors
scores.py       scores and differences with intervals, as tables
figures.py      figures of the page
page.py         one self-contained HTML page
"""
