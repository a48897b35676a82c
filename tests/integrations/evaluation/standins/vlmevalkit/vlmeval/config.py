"""The models by name."""

from functools import partial

from vlmeval import vlm

supported_VLM = {"echo": partial(vlm.Echo)}
