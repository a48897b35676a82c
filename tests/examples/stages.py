"""Runs the examples one after another in the processes of one launch, each as `__main__`.

    accelerate launch ... tests/examples/stages.py plan.json [--as-gpus]

The plan is a list: `[script, arguments]` runs a script, `["copy", from, to]` copies a folder on the first process.
accelerate shards over GPUs only; --as-gpus has it take processes without one for them.

Starting Python, torch and transformers takes longer than any of the scripts does on small folders.
"""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import torch


def main():
    first = os.environ.get("RANK", "0") == "0"
    if "--as-gpus" in sys.argv:
        as_gpus()
    for step in json.loads(Path(sys.argv[1]).read_text()):
        if step[0] == "copy":
            if first:
                shutil.copytree(step[1], step[2])
            torch.distributed.barrier()  # a script has begun before, so there is a process group
            continue
        sys.argv = [step[0], *step[1]]
        if first:
            print(f"== {step[0]} {' '.join(step[1])}", flush=True)
        runpy.run_path(step[0], run_name="__main__")
    # A process that ends while another still writes can die of its own communication threads.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def as_gpus():
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


if __name__ == "__main__":
    main()
