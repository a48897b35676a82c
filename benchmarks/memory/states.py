"""Bytes of weights, gradients and optimizer on each GPU, by how they are distributed."""

from __future__ import annotations

from dataclasses import dataclass

HALF, FULL = 2, 4  # bytes of bfloat16 and of float32
# configs/deepspeed/zero2.json and zero3.json, elements.
BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000
STRATEGIES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")


@dataclass(frozen=True)
class Counts:
    """Parameters of a model.

    Attributes:
        trained: Those that train.
        frozen: The others.
        block: Those of the largest layer that is sharded by itself.
        root: Those that belong to no such layer.
    """

    trained: int
    frozen: int
    block: int = 0
    root: int = 0


@dataclass(frozen=True)
class States:
    """Bytes on one GPU, activations not counted.

    Attributes:
        weights: Weights as the model holds them.
        gradients: Their gradients.
        copies: Float32 weights that the optimizer keeps beside them.
        optimizer: AdamW's two moments.
        buffers: What is gathered, reduced or cast for a time.
    """

    weights: float
    gradients: float
    copies: float
    optimizer: float
    buffers: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.copies + self.optimizer + self.buffers


def states(counts: Counts, strategy: str, gpus: int) -> States:
    """Return the bytes on each GPU.

    Under DDP and FSDP2 what trains is float32 and computes in bfloat16; what is frozen is bfloat16. DeepSpeed keeps
    everything in bfloat16, and float32 copies of what trains in its optimizer.

    Args:
        counts: Parameters of the model.
        strategy: One of `STRATEGIES`.
        gpus: Number of GPUs.
    """
    trained, frozen = counts.trained, counts.frozen
    moments = 2 * FULL * trained
    if strategy == "DDP":
        # Buckets for the reduction, where there is one; the bfloat16 weights that autocast keeps until backward.
        buckets = FULL * trained if gpus > 1 else 0
        return States(FULL * trained + HALF * frozen, FULL * trained, 0, moments, buckets + HALF * trained)
    if strategy == "FSDP2":
        # In bfloat16: the root, the layer that runs and the one that is fetched; the gradient of one of them.
        gathered = HALF * (counts.root + 2 * counts.block + max(counts.block, counts.root))
        return States(
            (FULL * trained + HALF * frozen) / gpus, FULL * trained / gpus, 0, moments / gpus, gathered
        )  # fmt: skip
    copies, gradients = FULL * trained / gpus, HALF * trained / gpus
    if strategy == "ZeRO-2":
        bucket = HALF * min(BUCKET, trained)
        return States(HALF * (trained + frozen), gradients, copies, moments / gpus, bucket)
    assert strategy == "ZeRO-3"
    live = HALF * min(MAX_LIVE, trained + frozen)
    return States(HALF * (trained + frozen) / gpus, gradients, copies, moments / gpus, live)
