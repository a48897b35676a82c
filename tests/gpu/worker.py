"""What one of several processes does: `python -m tests.gpu.worker SCENARIO RANK WORLD FOLDER DEVICE`."""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from covft.integrations import get_encoder
from tests.distributed.llava import attached_model, loss_of, trained_gradients


def ddp(rank: int, world: int, folder: Path, device: torch.device) -> None:
    """Replicated, with and without checkpointing."""
    for routing in ("dense", "sparse"):
        model = attached_model(folder, routing=routing).to(device)
        if routing == "sparse":
            get_encoder(model).gradient_checkpointing_enable()
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
        loss_of(parallel, rank, world).backward()
        if rank == 0:
            torch.save(trained_gradients(parallel), folder / f"{routing}.pt")


def fsdp2(rank: int, world: int, folder: Path, device: torch.device) -> None:
    """Sharded, in float64; then three steps in bfloat16 with float32 weights, as people train."""
    for routing in ("dense", "sparse"):
        model = attached_model(folder, routing=routing).to(device)
        shard(model, world, device)
        loss_of(model, rank, world).backward()
        gradients = trained_gradients(model)
        if rank == 0:
            torch.save(gradients, folder / f"{routing}.pt")
    model = attached_model(folder, torch.float32).to(device)
    get_encoder(model).gradient_checkpointing_enable()
    shard(model, world, device, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = loss_of(model, rank, world)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().double() / world
        distributed.all_reduce(total)
        losses.append(total.item())
    get_encoder(model).save_pretrained(folder / "tower")
    if rank == 0:
        torch.save(losses, folder / "losses.pt")


def shard(model: nn.Module, world: int, device: torch.device, **options: object) -> None:
    """Shard the blocks of the tower, the layers of the LLM, and the root."""
    mesh = init_device_mesh(device.type, (world,))
    for block in [*get_encoder(model).vit.encoder.layers, *model.model.language_model.layers]:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def main() -> None:
    scenario, rank, world, folder, kind = (
        sys.argv[1],
        int(sys.argv[2]),
        int(sys.argv[3]),
        Path(sys.argv[4]),
        sys.argv[5],
    )
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    torch.set_num_threads(1)
    if kind == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    {"ddp": ddp, "fsdp2": fsdp2}[scenario](rank, world, folder, device)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
