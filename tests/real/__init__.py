"""Runs covft inside real trainers and codebases, by the commands of the guides: `make real`, or

    python -m tests.real [ENGINE ...] [--fresh] [--page]

Each engine is a module of `tests/real/engines` with an environment of its own in `.real/ENGINE`, which later runs
reuse. PIP_ARGS goes to every pip install. Results are written to `tests/real/results/ENGINE.json`, and docs/engines.md
is made from those files alone.

An engine module has a docstring (one sentence: what is run) and

    REQUIREMENTS = ("ms-swift==4.6.0",)  # what pip installs, together with covft of this tree
    EXTRAS = ("train",)                  # optional: the extras of covft, by default these
    def missing() -> str | None: ...     # why it cannot run here, None if it can
    def run(bench: Bench) -> None: ...   # the steps

Commands come from the guides, so that the two cannot differ. A comment in front of a fenced block names it:

    <!-- run: train -->
    ```bash
    swift sft --model llava-hf/llava-1.5-7b-hf ...

`bench.documented("guides/ms-swift.md", "train", {"llava-hf/llava-1.5-7b-hf": "tiny"})` runs that block with its model,
data and sizes replaced; whatever is to be replaced has to be in it. The results keep the text of the block, and a
default test compares it with the guide of today: whoever changes a command runs its engine again.

Scripts that run inside the environment of an engine are in `tests/real/parts`; they import nothing of `tests`.
"""
