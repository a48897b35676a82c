"""`save_pretrained` of transformers, called on a wrapped ViT itself and on a multimodal LLM around one."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import covft
from benchmarks.coverage import page
from benchmarks.coverage.transformers_cases import all_cases, build
from covft.checkpoints.pretrained import MARK
from covft.errors import CheckpointError
from covft.integrations.mllm.families import find_tower
from covft.testing import HashTextEncoder
from tests.helpers.hub import without_repositories
from tests.helpers.mllms import BY_NAME as MLLMS
from tests.helpers.towers import body, perturb

TEXTS = HashTextEncoder(16)
# Plain; renamed in its files; the FFN in two halves, with the residual in the second; packed; channels first.
KINDS = (
    "CLIPVisionModel",
    "ViTModel",
    "VideoMAEModel",
    "Data2VecVisionModel",
    "Qwen2_5_VisionTransformerPretrainedModel",
    "MobileViTV2Model",
)
FOUND = {result["class_name"]: result["verdict"] for result in page.read("transformers")}
QUESTIONS = ["how many?", "where?"]


def call(vit: nn.Module, name: str) -> tuple[Tensor, ...]:
    args, kwargs = all_cases()[name][2].inputs(vit, [0, 1])
    with torch.no_grad():
        output = vit(*args, **kwargs)
    values = (output,) if isinstance(output, Tensor) else output.to_tuple()
    return tuple(value for value in values if isinstance(value, Tensor))


def answers(encoder: covft.ContextEncoder, name: str) -> tuple[Tensor, ...]:
    with encoder.condition(QUESTIONS):
        return call(encoder.vit, name)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def wrapped(name: str, **settings: Any) -> covft.ContextEncoder:
    encoder = covft.wrap(build(name), TEXTS, **settings)
    perturb(encoder)
    return encoder


def load(vit: Any, folder: Path) -> Any:
    loaded, info = type(vit).from_pretrained(folder, output_loading_info=True)
    found = {key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]}
    assert found <= {MARK}, info
    return loaded.eval()


@pytest.mark.parametrize("name", KINDS)
def test_tower__is_written_as_it_was_and_the_adapted_weights_beside_it(name, tmp_path):
    before = call(build(name), name)
    encoder = wrapped(name)
    after = answers(encoder, name)
    assert not same(before, after)
    encoder.vit.save_pretrained(tmp_path)
    vit = load(encoder.vit, tmp_path)
    assert same(call(vit, name), before)
    assert same(answers(covft.load(tmp_path / "covft", vit, TEXTS), name), after)
    assert same(answers(encoder, name), after)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, verdict in FOUND.items() if verdict == "wrapped" and name not in KINDS]
)
def test_every_tower__is_written_as_it_was_and_the_adapted_weights_beside_it(name, tmp_path):
    vit: Any = build(name)
    vit.save_pretrained(tmp_path / "plain")
    plain = load(vit, tmp_path / "plain").state_dict()
    encoder = covft.wrap(vit, TEXTS)
    perturb(encoder)
    vit.save_pretrained(tmp_path / "wrapped")
    loaded = load(vit, tmp_path / "wrapped")
    assert loaded.state_dict().keys() == plain.keys()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in loaded.state_dict().items())
    adapted = covft.load(tmp_path / "wrapped" / "covft", loaded, TEXTS).adapted_state_dict()
    assert adapted.keys() == encoder.adapted_state_dict().keys()
    assert all(torch.equal(tensor, adapted[key]) for key, tensor in encoder.adapted_state_dict().items())


def test_tower__what_the_caller_trained_too_is_saved_as_it_is(tmp_path):
    encoder = wrapped("CLIPVisionModel")
    with torch.no_grad():
        body(encoder.vit).embeddings.class_embedding.add_(1)
    changed = body(encoder.vit).embeddings.class_embedding.clone()
    encoder.vit.save_pretrained(tmp_path)
    assert torch.equal(body(load(encoder.vit, tmp_path)).embeddings.class_embedding, changed)


def test_tower__in_another_type_and_with_a_state_dict_that_was_gathered(tmp_path):
    from safetensors.torch import load_file

    encoder = wrapped("VideoMAEModel")
    encoder.to(torch.bfloat16)
    gathered = {name: tensor.clone() for name, tensor in encoder.vit.state_dict().items()}
    encoder.vit.save_pretrained(tmp_path, state_dict=gathered)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    plain = build("VideoMAEModel").to(torch.bfloat16).state_dict()
    loaded = load(encoder.vit, tmp_path).state_dict()
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in loaded.items())


def test_tower__a_state_dict_has_the_names_of_the_running_model():
    encoder = wrapped("CLIPVisionModel")
    assert any(".experts.0." in name for name in encoder.vit.state_dict())
    assert not any(name.startswith("save_pretrained") for name in encoder.vit.state_dict())


def test_tower__copies_and_pickles_save_themselves(tmp_path):
    encoder = wrapped("CLIPVisionModel")
    for number, twin in enumerate((copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder)))):
        twin.set_text_encoder(TEXTS)
        perturb(twin)
        after = answers(twin, "CLIPVisionModel")
        assert not same(after, answers(encoder, "CLIPVisionModel"))
        twin.vit.save_pretrained(tmp_path / str(number))
        vit = load(twin.vit, tmp_path / str(number))
        assert same(answers(covft.load(tmp_path / str(number) / "covft", vit, TEXTS), "CLIPVisionModel"), after)
    vit = copy.deepcopy(encoder.vit)
    vit.save_pretrained(tmp_path / "vit")
    assert same(call(load(vit, tmp_path / "vit"), "CLIPVisionModel"), call(build("CLIPVisionModel"), "CLIPVisionModel"))


def test_tower__after_unwrap_it_saves_as_before(tmp_path):
    encoder = wrapped("CLIPVisionModel")
    vit: Any = covft.unwrap(encoder)
    assert "save_pretrained" not in vit.__dict__
    assert not vit._state_dict_hooks
    vit.save_pretrained(tmp_path)
    assert not (tmp_path / "covft").exists()
    assert same(call(load(vit, tmp_path), "CLIPVisionModel"), call(vit, "CLIPVisionModel"))


def test_tower__a_process_that_is_not_the_main_one_writes_no_more_than_a_plain_model(tmp_path):
    vit: Any = wrapped("CLIPVisionModel").vit
    build("CLIPVisionModel").save_pretrained(tmp_path / "plain", is_main_process=False)
    vit.save_pretrained(tmp_path / "wrapped", is_main_process=False)
    written, plain = ({p.name for p in (tmp_path / kind).rglob("*")} for kind in ("wrapped", "plain"))
    assert written == plain  # nothing, but the weights before release 5 of transformers
    with pytest.raises(CheckpointError, match="distributed_checkpoint"):
        vit.save_pretrained(tmp_path / "a", distributed_checkpoint=True)


@pytest.fixture
def uploaded(monkeypatch):
    """Files that would be uploaded, by repository."""
    from transformers.utils import hub

    seen: dict[str, set[str]] = {}

    def upload(self, folder, repo_id, *args, **kwargs):
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        seen.setdefault(repo_id, set()).update(path.relative_to(folder).as_posix() for path in files)

    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    without_repositories(monkeypatch)
    return seen


def test_tower__push_to_hub_uploads_the_adapted_weights_too(uploaded, tmp_path):
    vit: Any = wrapped("CLIPVisionModel").vit
    vit.push_to_hub("me/one")
    vit.save_pretrained(tmp_path / "two", push_to_hub=True)
    vit.save_pretrained(tmp_path / "two", push_to_hub=True, repo_id="me/three", private=True)
    files = {"config.json", "model.safetensors", "covft/covft_config.json", "covft/model.safetensors"}
    assert set(uploaded) == {"me/one", "two", "me/three"}
    assert all(files <= found for found in uploaded.values())


# A multimodal LLM whose tower was wrapped, not attached.


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_mllm__is_written_as_it_was_and_the_adapted_weights_beside_it(name, tmp_path):
    model = MLLMS[name].build()
    tower = find_tower(model)[0]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    encoder = covft.wrap(tower, TEXTS)
    perturb(encoder)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    running = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert any(".experts.0." in key for key in running)
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path)
    assert loaded.state_dict().keys() == state.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key] + 1 if key.endswith("lm_head.weight") else state[key]), key
    again = covft.load(tmp_path / "covft", find_tower(loaded)[0], TEXTS)
    assert again.adapted_state_dict().keys() == encoder.adapted_state_dict().keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, running[key]), key
    # The saved model itself has not changed.
    assert model.state_dict().keys() == running.keys()


def test_mllm__runtime_names_are_never_written(tmp_path):
    model = MLLMS["llava"].build()
    covft.wrap(find_tower(model)[0], TEXTS)
    with pytest.raises(CheckpointError, match=r"from_pretrained does not know.*(\n.*)*\.experts\.0\."):
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"\.experts\.0\."):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not list(tmp_path.rglob("*.safetensors"))
    model.save_pretrained(tmp_path / "main", is_main_process=False)
    assert not (tmp_path / "main" / "covft").exists()


def test_mllm__with_an_unwrapped_tower_saves_as_before(tmp_path):
    model = MLLMS["llava"].build()
    covft.unwrap(covft.wrap(find_tower(model)[0], TEXTS))
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert not (tmp_path / "covft").exists()
    load(model, tmp_path)
