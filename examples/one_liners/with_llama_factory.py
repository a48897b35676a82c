"""Trains a multimodal LLM with a context-aware tower in LLaMA-Factory.

    python examples/one_liners/with_llama_factory.py llava1_5_lora_sft.yaml

The YAML file is an ordinary one of LLaMA-Factory. `freeze_vision_tower: true`: the callback trains the experts.
`use_reentrant_gc: false`: with the default, the experts of a frozen tower would get no gradient.
"""

from llamafactory.train.tuner import run_exp

from covft import CoVFTCallback

run_exp(callbacks=[CoVFTCallback("bert-base-uncased")])  # reads the YAML file that the command line names
