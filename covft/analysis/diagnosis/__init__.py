"""Should the tower be frozen, tuned, tuned with LoRA, or tuned with context routing?

entries.py    reads a random few of the data, with texts and kinds
kinds.py      finds kinds of instruction in the texts
losses.py     finds the tower, and the loss
probe.py      short trainings on each kind, and what they do to the others
verdict.py    the rule
result.py     Diagnosis: numbers, words, a page
diagnose.py   diagnose(), which puts them together
"""

from covft.analysis.diagnosis.probe import Change, Probe
from covft.analysis.diagnosis.result import Diagnosis
from covft.analysis.diagnosis.run import diagnose
from covft.analysis.diagnosis.verdict import Evidence, PairEvidence, Verdict, decide

__all__ = ["Change", "Diagnosis", "Evidence", "PairEvidence", "Probe", "Verdict", "decide", "diagnose"]
