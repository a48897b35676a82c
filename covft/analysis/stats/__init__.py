"""Numbers of what was recorded; nothing is drawn here.

contexts.py     components, clusters, similarity within and between groups
routing.py      load, entropy, specialisation, routing against context
divergence.py   how far experts have come apart
attention.py    where the context looks, and where features move with another question
overhead.py     parameters, FLOPs, time, memory
"""

from covft.analysis.stats.attention import AttentionMaps, QuestionMaps, attention_maps, compare_questions
from covft.analysis.stats.contexts import Clusters, Projection, Similarity, cluster, project, similarity
from covft.analysis.stats.divergence import Divergence, divergence
from covft.analysis.stats.overhead import Cost, overhead
from covft.analysis.stats.routing import (
    Correlation,
    LayerRouting,
    Specialisation,
    correlate,
    pair_similarities,
    specialisation,
    summarise,
)

__all__ = [
    "AttentionMaps",
    "Clusters",
    "Correlation",
    "Cost",
    "Divergence",
    "LayerRouting",
    "Projection",
    "QuestionMaps",
    "Similarity",
    "Specialisation",
    "attention_maps",
    "cluster",
    "compare_questions",
    "correlate",
    "divergence",
    "overhead",
    "pair_similarities",
    "project",
    "similarity",
    "specialisation",
    "summarise",
]
