"""Stand-ins for the modules of ms-swift 4.6 that the plug-in meets: their names, signatures and steps."""

from __future__ import annotations

import inspect
import re
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from tests.helpers.mllms import MLLM
from tests.helpers.towers import image_features


class Template:
    """The part of swift.template.Template that a tower may be run in."""

    def pre_forward_hook(self, model, args, kwargs):
        old, kwargs = kwargs, self._post_encode(model, kwargs)
        for name in ("input_ids", "attention_mask", "labels"):
            if name in old and name not in kwargs:
                kwargs[name] = old[name]
        if "inputs_embeds" in kwargs:
            kwargs.pop("input_ids", None)
        assert "input_ids" in inspect.signature(model.forward).parameters
        return args, kwargs

    def _post_encode(self, model, inputs):
        return inputs

    def register_post_encode_hook(self, models):
        for model in models:
            model.register_forward_pre_hook(self.pre_forward_hook, with_kwargs=True)


class EmbeddingTemplate(Template):
    """Runs the tower before the model's forward, as theirs for InternVL does."""

    def _post_encode(self, model, inputs):
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        if inputs.get("pixel_values") is None:
            dummy = image_features(model.get_image_features(pixel_values=torch.zeros(1, 3, 32, 32)))
            dummy = dummy if isinstance(dummy, torch.Tensor) else torch.cat(list(dummy))
            return {"inputs_embeds": embeds + dummy.mean() * 0.0}
        features = image_features(model.get_image_features(pixel_values=inputs["pixel_values"]))
        mask = (inputs["input_ids"] == model.config.image_token_id)[..., None].expand_as(embeds)
        features = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
        return {"inputs_embeds": embeds.masked_scatter(mask, features.to(embeds))}


class PeftTuner:
    """swift.tuner_plugin.PeftTuner, which its own tuners of peft derive from."""

    @staticmethod
    def from_pretrained(model, model_id, **kwargs):
        import peft

        return peft.PeftModel.from_pretrained(model, model_id, **kwargs)


def get_target_modules(args, model):
    """Patterns of users as they are; "all-linear" is what the flags leave unfrozen."""
    if isinstance(args.target_modules, str) or "all-linear" not in args.target_modules:
        return args.target_modules
    architecture, parts = model.model_meta.model_arch, []
    for frozen, paths in (
        (args.freeze_llm, architecture.language_model),
        (args.freeze_vit, architecture.vision_tower),
        (args.freeze_aligner, architecture.aligner),
    ):
        parts += [] if frozen else [path for path in paths if path != "lm_head"]
    names = {
        name.rpartition(".")[2]
        for path in parts
        for name, module in model.get_submodule(path).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return rf"^(({'|'.join(map(re.escape, parts))})(?=\.).*\.({'|'.join(sorted(names))}))$"


def get_modules_to_save(args, model, task_type=None):
    """Names of users as they are."""
    return list(args.modules_to_save)


def prepare_adapter(args, model, *, template=None, train_dataset=None, task_type=None):
    """Their LoRA of peft."""
    import peft

    assert args.tuner_type == "lora"
    config = peft.LoraConfig(
        task_type=args.task_type.upper(),
        r=args.lora_rank,
        target_modules=get_target_modules(args, model),
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        modules_to_save=get_modules_to_save(args, model),
        init_lora_weights=args.init_weights,
    )
    return peft.get_peft_model(model, config)


def merge_and_unload(model, **kwargs):
    """Merges the adapters of a PeftModel, and leaves others as they are."""
    if hasattr(model, "peft_config"):
        model.merge_and_unload()


def modules() -> dict[str, Any]:
    """Return fresh stand-ins by the names of the modules."""
    names = ("swift", "swift.tuner_plugin", "swift.template", "swift.tuners", "swift.pipelines")
    made: dict[str, Any] = {name: ModuleType(name) for name in (*names, "swift.pipelines.train")}
    tuner: Any = ModuleType("swift.pipelines.train.tuner")
    tuner.prepare_adapter, tuner.get_target_modules = prepare_adapter, get_target_modules
    tuner.get_modules_to_save = get_modules_to_save
    made["swift.tuner_plugin"].Tuner = type("Tuner", (), {})
    made["swift.tuner_plugin"].PeftTuner = PeftTuner
    made["swift.tuner_plugin"].tuners_map = {}
    made["swift.template"].Template = Template
    made["swift.tuners"].Swift = type("Swift", (), {"merge_and_unload": staticmethod(merge_and_unload)})
    return {**made, tuner.__name__: tuner}


def arguments(**given: Any) -> SimpleNamespace:
    """Return the arguments of `swift sft` with their defaults."""
    return SimpleNamespace(
        **{
            "tuner_type": "covft",
            "task_type": "causal_lm",
            "freeze_llm": False,
            "freeze_vit": True,
            "freeze_aligner": True,
            "target_modules": ["all-linear"],
            "modules_to_save": [],
            "lora_rank": 8,
            "lora_alpha": 32.0,
            "lora_dropout": 0.05,
            "lora_bias": "none",
            "init_weights": True,
            "tuner_backend": "peft",
            "use_swift_lora": False,
            **given,
        }
    )


LLAVA = {
    "language_model": ["model.language_model", "lm_head"],
    "aligner": ["model.multi_modal_projector"],
    "vision_tower": ["model.vision_tower"],
}
QWEN = {
    "language_model": ["model.language_model", "lm_head"],
    "aligner": ["model.visual.merger"],
    "vision_tower": ["model.visual"],
}


def model_of(kind: MLLM, folder: object = "somewhere") -> Any:
    """Return a model as ms-swift hands models over: always the same weights."""
    torch.manual_seed(6)
    return as_loaded(kind.build(), folder)


def as_loaded(model: Any, folder: object = "somewhere") -> Any:
    """Add to a LLaVA or a Qwen-VL what ms-swift adds to models that it loads."""
    architecture = SimpleNamespace(**(QWEN if hasattr(model.model, "visual") else LLAVA))
    model.model_meta = SimpleNamespace(model_arch=architecture, is_multimodal=True)
    model.model_info = SimpleNamespace(model_dir=str(folder))
    return model
