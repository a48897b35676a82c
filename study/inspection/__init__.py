"""What towers of the study do: contexts, routing, attention, use of the text; how far updates and tasks disagree.

look.py          looks at one trained covft
conditioning.py  audits it: is its text used?
distance.py      how far two tasks, and two halves of one, drive towers apart
trained.py       trains covft, full tuning and towers of two tasks, and writes what there is to see
draw.py          the figures, from the numbers that were written
sections.py      sections of the page about distance and audit
page.py          the page around them
agreement.py     does the diagnosis foretell where covft beats full tuning?
"""
