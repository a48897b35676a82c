"""Counts the bytes that one process holds: `python -m tests.distributed.bytes_worker SCENARIO RANK WORLD FOLDER`.

One step of training, on the CPU: float32 weights, their gradients, AdamW's moments.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import torch
from torch import Tensor, distributed, nn

from tests.distributed.llava import attached_model, loss_of
from tests.distributed.worker import shard


def local_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the parts of these tensors that are here."""
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


def main() -> None:
    scenario, rank, world, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )  # fmt: skip
    model = attached_model(folder, torch.float32)
    counts = {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "frozen": sum(p.numel() for p in model.parameters() if not p.requires_grad),
    }
    running = model
    if scenario == "ddp":
        running = nn.parallel.DistributedDataParallel(model)
    else:
        shard(model, world, checkpointing=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss_of(running, rank, world).backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found = {
        **counts,
        "weights": local_bytes(list(model.parameters())),
        "gradients": local_bytes([p.grad for p in model.parameters() if p.grad is not None]),
        "optimizer": local_bytes(moments),
    }
    (folder / f"bytes-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
