"""Every field of a saved configuration with bad values: an error of covft or a correct load, and the ViT as it was."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch

import covft
from covft.checkpoints.folder import read_folder
from covft.errors import CheckpointError, CoVFTError
from covft.utils.transformers_names import saved_names
from tests.helpers.checkpoints import WIDTH, clip_vit, wrapped
from tests.helpers.snapshots import assert_unchanged, snapshot
from tests.helpers.towers import perturb

DELETED = object()
BAD = [
    DELETED, None, True, False, 0, -1, 7, 2**31, 10**30, 1.5, -0.0, 1e300, "", "x", "1", "a\nb\x00", "é" * 2000, [],
    [[]], [None], [0, 0], {}, {"a": 1}, {"": None},
]  # fmt: skip
FIELDS = {
    "": [
        *("format", "library_version", "covft", "base", "text", "reading", "extra", "dtype", "other_dtypes", "weights"),
        "unknown",
    ],
    "covft": [*covft.CoVFTConfig.__annotations__, "unknown"],
    "base": ["source", "revision", "library", "class_name", "fingerprint", "unknown"],
    "base.fingerprint": ["num_tensors", "names", "types", "values", "samples", "unknown"],
    "text": ["source", "text_dim", "revision", "unknown"],
    "weights": ["file", "bytes", "sha256", "unknown"],
}
PATHS = [f"{section}.{name}".lstrip(".") for section, names in FIELDS.items() for name in names]
# Values of the right type that say something else than the weights do.
FALSE: dict[str, list] = {
    "covft.layers": [[0, 1], [1], [1, 2, 3], [2, 1, 1], [3, 99], list(range(2000))],
    "covft.experts": [1, 3, 200, 200_000],
    "covft.routing": ["sparse", "uniform", "random"],
    "covft.top_k": [1, 3, 100_000],
    "covft.context": ["image", "text", "concat"],
    "covft.train_norms": ["adapted", "none"],
    "covft.num_heads": [3, 5, 8, 1_000_000],
    "covft.expert_rank": [1, 4, 1_000_000],
    "covft.attention_rank": [1, 4, 1_000_000],
    "covft.feature_layer": [0, 1, 2, 4, -2, -5, 99],
    "text.text_dim": [4, 1_000_000],
    "dtype": ["float16", "bfloat16", "float64", "int64", "bool"],
    "extra": [["vision_model.post_layernorm.weight"], ["nowhere"], ["mlp"]],
    "other_dtypes": [{"nowhere": "float32"}],
}
TEXTS = {
    "twice": lambda text: text.replace('"format": 1', '"format": 1, "format": 1'),
    "nan": lambda text: text.replace('"experts": 2', '"experts": NaN'),
    "infinity": lambda text: text.replace('"experts": 2', '"experts": 1e999'),
    "digits": lambda text: text.replace('"experts": 2', f'"experts": {"9" * 6000}'),
    "deep": lambda text: text.replace('"extra": []', f'"extra": {"[" * 100_000}{"]" * 100_000}'),
    "half a character": lambda text: text.replace('"extra": []', '"extra": ["\\ud800"]'),
    "cut": lambda text: text[:-20],
    "more": lambda text: f"{text} {{}}",
    "a list": lambda text: f"[{text}]",
    "comment": lambda text: f"// mine\n{text}",
    "large": lambda text: text + " " * (1 << 24),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base ViT, the folder of an encoder made from it, and its configuration."""
    torch.manual_seed(0)
    base = clip_vit().eval()
    encoder = wrapped(copy.deepcopy(base))
    perturb(encoder)
    folder = tmp_path_factory.mktemp("saved")
    encoder.save_pretrained(folder)
    config = json.loads((folder / "covft_config.json").read_text(encoding="utf-8"))
    assert set(FIELDS[""]) == {*config, "unknown"}
    for section in ("covft", "base", "text", "weights"):
        assert set(FIELDS[section]) == {*config[section], "unknown"}
    return base, folder, config


def changed(config, path, value):
    """Return a configuration with another value of one field."""
    result = copy.deepcopy(config)
    *parents, name = path.split(".")
    place = result
    for parent in parents:
        place = place[parent]
    if value is DELETED:
        place.pop(name, None)
    else:
        place[name] = value
    return result


def load_or_refuse(vit, before, folder, tensors):
    """Load, and return whether it was possible; the ViT is as it was after a refusal, and after unwrap."""
    try:
        loaded = covft.load(folder, vit, WIDTH)
    except CoVFTError:
        assert_unchanged(vit, before)
        return False
    named = saved_names(loaded.vit)
    found = {named(name): tensor for name, tensor in loaded.adapted_state_dict().items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    assert_unchanged(covft.unwrap(loaded), before)
    return True


# Where any text is possible: they are read only if the ViT or the text encoder is not given.
FREE = ("base.source", "base.revision", "base.library", "base.class_name", "text.", "library_version")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("path", PATHS)
def test_each_field_with_bad_values(path, saved):
    base, folder, config = saved
    tensors, _ = read_folder(folder)
    vit = copy.deepcopy(base)
    before = snapshot(vit)
    original = (folder / "covft_config.json").read_text(encoding="utf-8")
    right = config
    for name in path.split("."):
        right = right.get(name, DELETED) if isinstance(right, dict) else DELETED
    accepted = []
    try:
        for value in [*BAD, *FALSE.get(path, [])]:
            if type(value) is type(right) and value == right:
                continue
            mutated = changed(config, path, value)
            (folder / "covft_config.json").write_text(json.dumps(mutated), encoding="utf-8")
            if load_or_refuse(vit, before, folder, tensors):
                accepted.append(value)
    finally:
        (folder / "covft_config.json").write_text(original, encoding="utf-8")
    if path.endswith("unknown"):
        assert not accepted
    elif path.startswith("covft."):
        check_accepted_settings(path, accepted, right)
    elif path == "reading":  # of `attach`, and checked by `load_model`
        assert all(value is DELETED or value is None or isinstance(value, dict) for value in accepted)
    elif path in ("other_dtypes", "base.fingerprint.num_tensors", "base.fingerprint.samples"):
        assert all(value is DELETED or isinstance(value, (dict, int, str)) for value in accepted)
    else:
        # Types that are not those of the weights, such as float64 for float32, mean another comparison of the base.
        assert not accepted or path.startswith(FREE), accepted


NUMBERS = [0, 1, 7, 1.5, -0.0, 2**31, 10**30, 1e300]


def check_accepted_settings(path, accepted, right):
    """Settings that load are those that the same weights fit: they only say how the model runs, or are unused."""
    name = path.partition(".")[2]
    kinds = {
        "layers": [[2, 1]],
        "top_k": [1, 7, 2**31, 3, 100_000],
        "routing": ["sparse"],
        "num_heads": [8, 1, 2],
        "feature_layer": [4, -2, -1, 7],
        "train_norms": [],
        "router_aux_loss_coef": NUMBERS,
        "expert_init_scale": NUMBERS,
        "expert_init_seed": [1, 7, 100_000],
        "null_text_rate": NUMBERS,
    }
    for value in accepted:
        assert value is DELETED or value in kinds.get(name, []), (value, right)


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_is_not_strict_json_is_refused(name, saved):
    base, folder, _ = saved
    original = (folder / "covft_config.json").read_text(encoding="utf-8")
    vit = copy.deepcopy(base)
    before = snapshot(vit)
    try:
        text = TEXTS[name](original)
        assert text != original
        (folder / "covft_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError):
            covft.load(folder, vit, WIDTH)
    finally:
        (folder / "covft_config.json").write_text(original, encoding="utf-8")
    assert_unchanged(vit, before)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_another_encoding_is_refused(encoding, saved):
    base, folder, _ = saved
    original = (folder / "covft_config.json").read_text(encoding="utf-8")
    try:
        (folder / "covft_config.json").write_text(original, encoding=encoding)
        with pytest.raises(CheckpointError, match="is damaged"):
            covft.load(folder, copy.deepcopy(base), WIDTH)
    finally:
        (folder / "covft_config.json").write_text(original, encoding="utf-8")


@pytest.mark.parametrize(
    "settings", [{"experts": 200_000}, {"expert_rank": 2**20}, {"experts": 2**20, "expert_rank": 2**20}]
)
def test_sizes_that_the_weights_do_not_have_are_refused_at_once(settings, saved):
    base, folder, config = saved
    original = (folder / "covft_config.json").read_text(encoding="utf-8")
    vit = copy.deepcopy(base)
    start = time.process_time()
    try:
        (folder / "covft_config.json").write_text(json.dumps({**config, "covft": {**config["covft"], **settings}}))
        with pytest.raises(CheckpointError):
            covft.load(folder, vit, WIDTH)
    finally:
        (folder / "covft_config.json").write_text(original, encoding="utf-8")
    assert time.process_time() - start < 1


def test_there_are_enough_mutations():
    assert len(PATHS) * len(BAD) + sum(map(len, FALSE.values())) + len(TEXTS) > 400
