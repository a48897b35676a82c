"""Every way to tune a vision tower, by one call.

    method.py       Method: options, and the change that they mean for a ViT
    change.py       Change: trained parameters, new modules, hooks; applied and undone
    registry.py     methods by name, with those of other packages
    selection.py    methods that train a part of the ViT's own parameters
    lora.py         LoRA and DoRA, by peft
    tuned.py        TunedViT: what tune() returns
    saving.py       the saved folder
    loading.py      and back
    texts.py        the base of new modules that read the text
    attentions.py   which attentions take more tokens
    vpt.py, svpt.py, qa_vit.py, adaln.py, cross_attention.py
    q_moe.py        experts in the connector of a multimodal LLM
    budget.py       budget(): what a method costs
    matching.py     match(): options by which methods train the same number of parameters
    api.py          tune(), untune(), load()

A method says what it would change; `change.py` alone changes ViTs. So applying, undoing, saving, loading and counting
are the same for every method, and a method of your own is one class.
"""

from covft.tuning.api import load, tune, untune
from covft.tuning.budget import Budget, budget
from covft.tuning.change import Change, Hook
from covft.tuning.matching import Match, match
from covft.tuning.method import Method, Tower
from covft.tuning.registry import methods, register_method
from covft.tuning.tuned import TunedViT

__all__ = [
    "Budget",
    "Change",
    "Hook",
    "Match",
    "Method",
    "Tower",
    "TunedViT",
    "budget",
    "load",
    "match",
    "methods",
    "register_method",
    "tune",
    "untune",
]
