"""What one of several processes does: `python -m tests.distributed.worker SCENARIO RANK WORLD FOLDER`.

It leaves what it found in the folder, and the test compares that with what one process finds.
"""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import pytest
import torch
from torch import distributed, nn

import covft
from covft.checkpoints.loading import load_into
from covft.errors import CheckpointError, TextEncoderError, UnsupportedViTError
from covft.integrations import attach, detach, get_encoder
from covft.utils.sharding import full
from tests.distributed.llava import (
    LLAVA,
    SETTINGS,
    TEXTS,
    attached_model,
    lora_model,
    loss_of,
    option_loss,
    option_model,
    trained_gradients,
    tuned_model,
)


def ddp(rank: int, world: int, folder: Path) -> None:
    for routing in ("dense", "sparse"):
        model = attached_model(folder, routing=routing)
        if routing == "sparse":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
        loss_of(parallel, rank, world).backward()
        torch.save(trained_gradients(parallel), folder / f"{routing}-{rank}.pt")
    # Both processes save to the same place: the first one writes.
    model.save_pretrained(folder / "saved")


def tuned(rank: int, world: int, folder: Path) -> None:
    """Every method under DDP, with checkpointing where it reads text; some of them under FSDP2, and saved there."""
    from tests.helpers.tuned import READS_TEXT

    for method in covft.tuning.methods():
        model = tuned_model(folder, method)
        if method in READS_TEXT:
            get_encoder(model).gradient_checkpointing_enable()
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
        loss_of(parallel, rank, world).backward()
        torch.save(trained_gradients(parallel), folder / f"{method}-{rank}.pt")
    for method in ("lora", "bitfit", "adaln", "q_moe"):
        model = tuned_model(folder, method)
        shard(model, world, checkpointing=False)
        loss_of(model, rank, world).backward()
        gradients = trained_gradients(model)
        if rank == 0:
            torch.save(gradients, folder / f"{method}-fsdp2.pt")
        model.save_pretrained(folder / f"{method}-saved")


def options(rank: int, world: int, folder: Path) -> None:
    """Updates of attentions, a strength between its ends, and the null text: under DDP and under FSDP2."""
    for option in SETTINGS:
        model = option_model(folder, option)
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
        option_loss(parallel, option, rank, world).backward()
        torch.save(trained_gradients(parallel), folder / f"{option}-{rank}.pt")
        for checkpointing in (False, True):
            model = option_model(folder, option)
            shard(model, world, checkpointing=checkpointing)
            option_loss(model, option, rank, world).backward()
            gradients = trained_gradients(model)
            if rank == 0:
                torch.save(gradients, folder / f"{option}-fsdp2-{checkpointing}.pt")
        model.save_pretrained(folder / f"{option}-saved")


def updates(rank: int, world: int, folder: Path) -> None:
    """Transformers' Trainer under DDP, whose callback compares updates."""
    import json

    from tests.helpers.training import trained_updates

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    trainer = trained_updates(folder, per_device_train_batch_size=1)
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    (folder / f"log-{rank}.json").write_text(json.dumps(trainer.state.log_history))


def fsdp2(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    for routing in ("sparse", "dense"):
        model = attached_model(folder, routing=routing)
        shard(model, world, checkpointing=routing == "sparse")
        loss_of(model, rank, world).backward()
        gradients = trained_gradients(model)
        if rank == 0:
            torch.save(gradients, folder / f"{routing}.pt")
    encoder = get_encoder(model)
    model.eval()
    with torch.no_grad():  # leaves the root's own parameters whole
        loss_of(model, rank, world)
    # Before any step, so that the files can be compared bit by bit.
    model.save_pretrained(folder / "saved")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(model, options=options)  # empty but on the first process
    model.save_pretrained(folder / "gathered", state_dict=gathered, is_main_process=rank == 0)
    if rank == 0:  # as Trainer does it
        model.save_pretrained(folder / "first", state_dict=gathered)
    encoder.save_pretrained(folder / "tower")

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    stepped = get_model_state_dict(model, options=options)
    if rank == 0:
        torch.save(stepped, folder / "stepped.pt")
    load_into(encoder, folder / "tower")
    loaded = encoder.adapted_state_dict()
    if rank == 0:
        torch.save(loaded, folder / "loaded.pt")
    spread(rank, world, folder)


def fsdp2_lora(rank: int, world: int, folder: Path) -> None:
    """A PeftModel, saved as Trainer does it: from a gathered state dict that the first process alone has."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    from covft.integrations.training.peft_saving import save_with_adapters

    model = lora_model(folder)
    save_with_adapters(model)
    shard(model.get_base_model(), world, checkpointing=False)  # peft 0.21 does not find adapters in wrapped layers
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "saved", state_dict=gathered)
        with pytest.raises(CheckpointError, match="are sharded, and peft's save_pretrained does not gather them"):
            model.save_pretrained(folder / "nowhere")
        adapters = {name: tensor for name, tensor in gathered.items() if "lora_" in name}
        with pytest.warns(UserWarning, match="but not the context-aware tower"):
            model.save_pretrained(folder / "adapters", state_dict=adapters)
        model.save_pretrained(folder / "checkpoint-1", state_dict=adapters)  # to which the callback adds the tower
    get_encoder(model).save_pretrained(folder / "adapters" / "covft")  # as the warning says


def spread(rank: int, world: int, folder: Path) -> None:
    """Weights on the first process alone; the others get theirs when the model is sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if rank == 0:
        model = attached_model(folder)
    else:
        from transformers import AutoConfig, LlavaForConditionalGeneration

        with torch.device("meta"):
            model = LlavaForConditionalGeneration(AutoConfig.from_pretrained(folder / "base")).to(torch.float64)
            attach(model, TEXTS, tokenizer=LLAVA.tokenizer)
    state = model.state_dict() if rank == 0 else {}
    model.to("meta")
    shard(model, world, checkpointing=False)
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    model.save_pretrained(folder / "spread")
    get_encoder(model).save_pretrained(folder / "spread-tower")


def zero2(rank: int, world: int, folder: Path) -> None:
    zero(2, rank, world, folder)


def zero3(rank: int, world: int, folder: Path) -> None:
    zero(3, rank, world, folder)


def zero(stage: int, rank: int, world: int, folder: Path) -> None:
    """DeepSpeed on the CPU; of ZeRO-3 the weights are partitioned before attach() sees them, as with Trainer."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    alive = HfDeepSpeedConfig(config)
    assert alive.is_zero3() == (stage == 3)
    model = attached_model(folder, torch.float32)
    encoder = get_encoder(model)
    empty = [name for name, parameter in model.named_parameters() if parameter.numel() == 0]
    assert bool(empty) == (stage == 3)
    encoder.save_pretrained(folder / "before")
    if stage == 3:
        text_encoders(folder)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(loss_of(engine, rank, world))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = {name: deepspeed.utils.safe_get_full_grad(parameter) for name, parameter in named}
    torch.save(gradients, folder / f"dense-{rank}.pt")

    encoder.save_pretrained(folder / "tower")
    state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else None  # None but on the first process
    model.save_pretrained(folder / "saved", state_dict=state, is_main_process=rank == 0)
    if stage == 3 and rank == 0:
        with pytest.raises(CheckpointError, match=r"accelerator\.get_state_dict"):
            model.save_pretrained(folder / "nowhere")
    with pytest.raises(CheckpointError, match="inside a DeepSpeed engine"):
        load_into(encoder, folder / "tower")
    with pytest.raises(UnsupportedViTError, match="DeepSpeed engine"):
        covft.wrap(encoder.vit.encoder.layers[0], 8)
    engine.step()
    adapted = encoder.adapted_state_dict()
    if rank == 0:
        torch.save(adapted, folder / "stepped.pt")

    # A new run, which starts from the saved tower.
    again = loaded_model(folder)
    adapted = get_encoder(again).adapted_state_dict()
    if rank == 0:
        torch.save(adapted, folder / "loaded.pt")
    vit = detach(again).model.vision_tower
    plain = {name: full(tensor) for name, tensor in vit.state_dict(keep_vars=True).items()}
    if rank == 0:
        torch.save(plain, folder / "detached.pt")


def text_encoders(folder: Path) -> None:
    """No engine ever gathers a text encoder, so covft loads it whole, and refuses one that is not."""
    from transformers import AutoModel

    from covft.testing import ToyViT

    encoder = covft.wrap(ToyViT(), str(folder / "text"))
    assert encoder.encode_text("a cup").shape == (1, 16)
    with pytest.raises(TextEncoderError, match="partitioned by ZeRO-3"):
        covft.wrap(ToyViT(), (AutoModel.from_pretrained(folder / "text"), LLAVA.tokenizer))


def loaded_model(folder: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float32)
    return attach(model, TEXTS, tokenizer=LLAVA.tokenizer, pretrained=folder / "tower")


def shard(model: Any, world: int, *, checkpointing: bool) -> None:
    """As accelerate does it: blocks of the tower, layers of the LLM, the root; never the tower itself."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    tower, llm = get_encoder(model).vit, model.model.language_model
    blocks = [*tower.encoder.layers, *llm.layers]
    if checkpointing:
        apply_activation_checkpointing(model, check_fn=lambda module: module in blocks)
        blocks = [*tower.encoder.layers, *llm.layers]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def main() -> None:
    scenario, rank, world, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    globals()[scenario](rank, world, folder)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
