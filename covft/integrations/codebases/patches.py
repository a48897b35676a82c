"""Patches classes and functions of other libraries; `covft.integrations.codebases` lists them by codebase.

    transformers.Trainer.__init__               while a launcher runs            patched_trainers()
    the codebase's model loader                 while a launcher runs            patched_loader()
    torch.utils.checkpoint.checkpoint           while InternVL's tower runs      non_reentrant()
    swift.template.Template.pre_forward_hook    from ms-swift's plug-in onwards  hold_text()
    swift.tuners.Swift.merge_and_unload         from ms-swift's plug-in onwards  refuse_merging()
    transformers.Trainer.__init__               from ms-swift's plug-in onwards  joined_trainers()
    transformers' from_pretrained               while lmms-eval builds a model   loaded_already()
    accelerate.Accelerator.num_processes        while lmms-eval builds a model   one_process()

Methods of a model are overridden on the instance instead; see `covft.integrations.mllm.overrides`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.utils.checkpoint
from torch import nn

from covft.checkpoints.pretrained import FOLDER
from covft.errors import ConfigError
from covft.integrations.mllm.attachment import NO_IMAGE, attachment_of


@contextlib.contextmanager
def patched_trainers(attach: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Patch transformers' Trainer to attach the model that it is constructed with.

    Args:
        attach: Attaches a model, given its tokenizer.

    Raises:
        ConfigError: If a Trainer is given `model_init` instead of a model.
    """
    import transformers

    from covft.integrations.codebases.trainer_hooks import join_trainer
    from covft.integrations.training.reentrant import without_reentrant

    cls = transformers.Trainer
    original = cls.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        model, tokenizer = given.get("model"), given.get("tokenizer") or given.get("processing_class")
        if model is None:
            raise ConfigError("This Trainer creates its model itself.", expected="Trainer(model=...)", got="model_init")
        without_reentrant(given.get("args"))
        # The Trainer sets the same seed a moment later. Routers then start equal in every process and every run.
        transformers.set_seed(getattr(given.get("args"), "seed", 42))
        attach(model, tokenizer)
        original(self, *args, **kwargs)
        join_trainer(self)

    cls.__init__ = __init__
    try:
        yield
    finally:
        cls.__init__ = original


@contextlib.contextmanager
def patched_loader(
    name: str, attach: Callable[[nn.Module, Any, str | Path], None], pretrained: str | None
) -> Iterator[None]:
    """Patch a codebase's loader to attach the model that it returns, with the tower saved in the model's folder.

    Args:
        name: Dotted name of the function.
        attach: Attaches a model, given its tokenizer and the saved tower.
        pretrained: A saved tower that replaces the folder's.
    """
    module_name, _, function = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        module = None
    original = getattr(module, function, None)
    if original is None:
        yield
        return

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        saved = pretrained or _saved_with(args, kwargs)
        loaded = original(*args, **kwargs)
        model = next(part for part in loaded if isinstance(part, nn.Module))
        tokenizer = next(part for part in loaded if hasattr(part, "batch_decode"))
        attach(model, tokenizer, saved)
        return loaded

    setattr(module, function, load)
    try:
        yield
    finally:
        setattr(module, function, original)


def _saved_with(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Path:
    """Return the adapted tower in a model's folder: LLaVA's `model_path`, InternVL's `args.checkpoint`."""
    first: Any = args[0] if args else kwargs.get("model_path", kwargs.get("args"))
    folder = Path(getattr(first, "checkpoint", first))
    if not (folder / FOLDER).is_dir():
        raise ConfigError(
            f"{folder} was not trained with covft.",
            expected=f"a folder with {FOLDER}/ in it, or --covft_pretrained",
            got=str(folder),
            fix="run the script without this launcher to evaluate the original model",
        )
    return folder / FOLDER


@contextlib.contextmanager
def non_reentrant() -> Iterator[None]:
    """Make `torch.utils.checkpoint.checkpoint`, called by its full name, non-reentrant unless the call says otherwise.

    InternVL's encoder calls it without `use_reentrant`, which many releases of torch take for True.
    """
    home: Any = torch.utils.checkpoint
    before = home.checkpoint

    def checkpoint(function: Any, *args: Any, use_reentrant: bool | None = None, **kwargs: Any) -> Any:
        use_reentrant = False if use_reentrant is None else use_reentrant
        return before(function, *args, use_reentrant=use_reentrant, **kwargs)

    home.checkpoint = checkpoint
    try:
        yield
    finally:
        home.checkpoint = before


def hold_text(template: Any) -> None:
    """Patch ms-swift's templates to hold the text around `pre_forward_hook`, in which some of them run the tower.

    Those templates turn `input_ids` and images into `inputs_embeds` before the model's forward.

    Args:
        template: The class `swift.template.Template`.
    """
    inner = template.pre_forward_hook
    if getattr(inner, "_covft", False):
        return

    @functools.wraps(inner)
    def pre_forward_hook(self: Any, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        attachment = attachment_of(model)
        if attachment is None:
            _refuse_original_tower(model)
        if attachment is None or type(self)._post_encode is template._post_encode:
            return inner(self, model, args, kwargs)
        images = [kwargs.get(name) for name in ("pixel_values", "pixel_values_videos")]
        if any(image is not None for image in images) or attachment.encoder.conditioning.scope() is not None:
            held = attachment.conditioned(kwargs, None)
        else:  # some templates then run the tower on a dummy and multiply its features by zero
            held = attachment.encoder.condition(NO_IMAGE)
        with held:
            return inner(self, model, args, kwargs)

    pre_forward_hook._covft = True  # type: ignore[attr-defined]
    template.pre_forward_hook = pre_forward_hook


def refuse_merging(swift: Any) -> None:
    """Patch ms-swift's merging of adapters to refuse an attached model without LoRA, of which it would save a part.

    Args:
        swift: The class `swift.tuners.Swift`.
    """
    inner = swift.merge_and_unload
    if getattr(inner, "_covft", False):
        return

    @functools.wraps(inner)
    def merge_and_unload(model: nn.Module, **kwargs: Any) -> Any:
        if attachment_of(model) is not None and not hasattr(model, "peft_config"):
            raise ConfigError(
                "This checkpoint has no LoRA to merge: experts depend on the text, and stay in the tower.",
                expected="a checkpoint of --tuner_type covft_lora",
                got="one of --tuner_type covft",
                fix="swift infer --adapters with the checkpoint as it is",
            )
        return inner(model, **kwargs)

    merge_and_unload._covft = True  # type: ignore[attr-defined]
    swift.merge_and_unload = staticmethod(merge_and_unload)


def joined_trainers(join: Callable[[Any], None]) -> None:
    """Patch transformers' Trainer to join those that are constructed with an attached model.

    Args:
        join: Joins a constructed trainer.
    """
    import transformers

    from covft.integrations.training.reentrant import without_reentrant

    inner = transformers.Trainer.__init__
    if getattr(inner, "_covft", False):
        return
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        model: Any = given.get("model")
        attached = isinstance(model, nn.Module) and attachment_of(model) is not None
        if attached:
            without_reentrant(given.get("args"))
        inner(self, *args, **kwargs)
        if attached:
            join(self)

    __init__._covft = True  # type: ignore[attr-defined]
    transformers.Trainer.__init__ = __init__  # type: ignore[method-assign]


def _refuse_original_tower(model: Any) -> None:
    """Refuse to run a model whose folder has an adapted tower with the original one."""
    info = getattr(model, "model_info", None)
    if info is not None and (Path(info.model_dir) / FOLDER).is_dir():
        raise ConfigError(
            "The model was saved with an adapted tower, and is run with the original one.",
            expected=f"--adapters {info.model_dir}",
            got=f"--model {info.model_dir} alone",
            fix=f"swift infer --model {info.model_dir} --adapters {info.model_dir}",
        )


@contextlib.contextmanager
def loaded_already(model: nn.Module) -> Iterator[None]:
    """Patch `from_pretrained` of every model class of transformers to return this model.

    Args:
        model: What is returned, whatever is asked for.
    """
    import transformers

    cls: Any = transformers.PreTrainedModel  # auto classes call it
    original = vars(cls)["from_pretrained"]
    cls.from_pretrained = classmethod(lambda cls, *args, **kwargs: model)
    try:
        yield
    finally:
        cls.from_pretrained = original


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Patch `Accelerator.num_processes` to say 1, for code that prepares models for several processes on GPUs only."""
    from accelerate import Accelerator

    original = Accelerator.num_processes
    Accelerator.num_processes = property(lambda self: 1)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Accelerator.num_processes = original  # type: ignore[method-assign]
