"""Text encoders: they turn the question into the features that route the experts.

All are frozen: in eval mode at every call, without gradient, in no state dict. Each distinct string is encoded once,
alone, so that its features depend on nothing else.
"""

from covft.text.base import CachedTextEncoder, TextEncoder
from covft.text.cache import FeatureCache
from covft.text.callables import CallableTextEncoder
from covft.text.hf import HFTextEncoder
from covft.text.open_clip import OpenCLIPTextEncoder
from covft.text.precomputed import PrecomputedFeatures
from covft.text.resolve import as_text_encoder
from covft.text.sentence_transformers import SentenceTransformersEncoder
from covft.text.table import FeatureTable

__all__ = [
    "CachedTextEncoder",
    "CallableTextEncoder",
    "FeatureCache",
    "FeatureTable",
    "HFTextEncoder",
    "OpenCLIPTextEncoder",
    "PrecomputedFeatures",
    "SentenceTransformersEncoder",
    "TextEncoder",
    "as_text_encoder",
]
