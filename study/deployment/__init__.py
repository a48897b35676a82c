"""A trained covft model in the forms in which it may be served: `python -m study deploy`.

trained.py    one run, trained or read from a file
variants.py   the mixture as it is, merged, distilled, compressed, with skipped experts, and untuned
measure.py    accuracy, how far features move, time, FLOPs and bytes of each
command.py    the command
"""
