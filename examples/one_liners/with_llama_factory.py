"""LLaMA-Factory on a multimodal LLM whose tower becomes context-aware.

    python examples/one_liners/with_llama_factory.py llava1_5_lora_sft.yaml

The YAML file is LLaMA-Factory's own, with `freeze_vision_tower: true`: the callback trains what it adds.
"""

from llamafactory.train.tuner import run_exp

from covft import CoVFTCallback

run_exp(callbacks=[CoVFTCallback("bert-base-uncased")])  # reads the YAML file that the command line names
