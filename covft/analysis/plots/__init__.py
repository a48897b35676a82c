"""Figures of the numbers, with matplotlib; each function returns a `Figure`, to save or to show."""

from covft.analysis.plots.attention import plot_attention, plot_questions
from covft.analysis.plots.contexts import plot_contexts
from covft.analysis.plots.overhead import plot_overhead
from covft.analysis.plots.routing import plot_correlation, plot_routing

__all__ = ["plot_attention", "plot_contexts", "plot_correlation", "plot_overhead", "plot_questions", "plot_routing"]
