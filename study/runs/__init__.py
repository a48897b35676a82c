"""Resumable runs of the study: one JSON row each.

settings.py     settings of a run, its name and its label
sizes.py        the sizes: tower, language model, and the defaults that suit them
words.py        how a language model reads questions and writes answers
rows.py         rows on file, and which process works on which run
tables.py       questions as arrays, and the order of training
texts.py        what the tower is told: text features of each question, and the controls
methods.py      each method of covft.tune, as the study uses it
model.py        LLaVA in miniature: tower, fewer tokens, projector, language model
train.py        the training loop
graph.py        a step as a CUDA graph
score.py        scores by teacher forcing, and greedy answers
run.py          one run, from its settings to its row
plan.py         the named studies, as lists of runs
shared.py       what several runs need, made once
work.py         several processes on one list of runs
search.py       learning rates on validation scenes
command.py      `python -m study run` and `python -m study search`
"""
