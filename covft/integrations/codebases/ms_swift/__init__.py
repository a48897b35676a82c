"""ms-swift: tuners for `--external_plugins`, without edits to its files.

    COVFT_FLAGS="--covft_layers 11-22" swift sft --external_plugins .../ms_swift/covft_plugin.py --tuner_type covft ...

    covft_plugin.py    the file for `--external_plugins`
    covft_tuner.py     `--tuner_type covft`: the tower, and what ms-swift's flags leave unfrozen
    covft_lora.py      `--tuner_type covft_lora`: the tower, and LoRA on the language model

ms-swift adds the folder of a plug-in to the import path, so the plug-in has its own folder, and the names of its
modules begin with covft.
"""

from __future__ import annotations

import importlib

from covft.integrations.codebases.ms_swift import covft_lora, covft_tuner
from covft.integrations.codebases.patches import hold_text, joined_trainers, refuse_merging
from covft.integrations.codebases.trainer_hooks import PluginCallback, join_trainer

_METHODS = ("prepare_model", "save_pretrained", "from_pretrained")


def register() -> dict[str, type]:
    """Add the tuners to ms-swift, hold the text where its templates run the tower, and join its trainers.

    Returns:
        The tuners by the value of `--tuner_type`.
    """
    plugins = importlib.import_module("swift.tuner_plugin")
    tuners = {}
    for name, module in (("covft", covft_tuner), ("covft_lora", covft_lora)):
        methods = {method: staticmethod(getattr(module, method)) for method in _METHODS}
        tuners[name] = type(f"{name.title().replace('_', '')}Tuner", (plugins.Tuner,), methods)
    plugins.tuners_map.update(tuners)
    hold_text(importlib.import_module("swift.template").Template)
    refuse_merging(importlib.import_module("swift.tuners").Swift)
    joined_trainers(lambda trainer: join_trainer(trainer, PluginCallback()))
    return tuners
