"""The encoder stands where the ViT stood, and the usual tools work on it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import covft
from covft.errors import (
    CheckpointError,
    MergeError,
    MissingContextError,
    ShapeError,
    TextEncoderError,
    UnsupportedViTError,
)
from covft.nn import load_balance_loss
from tests.helpers.towers import BY_NAME, TEXT_DIM, TOWERS, features, perturb

KINDS = ["timm-clip", "timm-dinov3", "open_clip-native", "hf-clip", "hf-dinov2"]


def wrapped(name: str, text_encoder=TEXT_DIM, **settings):
    tower = BY_NAME[name]
    encoder = covft.wrap(tower.build().eval(), text_encoder, **settings)
    perturb(encoder)
    return encoder, tower.images(3), torch.randn(3, TEXT_DIM)


def hash_encoder():
    return covft.testing.HashTextEncoder(TEXT_DIM)


# Copies, pickles, compilers, types


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", KINDS)
def test_twins__compute_the_same_and_share_nothing(name, twin_of):
    encoder, images, text = wrapped(name, routing="sparse")
    kept = encoder.train()(images, text)  # leaves a record with a graph, which cannot be copied
    encoder.eval()
    twin = twin_of(encoder)
    assert torch.equal(features(twin(images, text)), features(encoder(images, text)))
    with torch.no_grad():
        next(twin.trainable_parameters()).add_(1.0)
    assert not torch.equal(features(twin(images, text)), features(encoder(images, text)))
    # The twin's FFNs get their text from the twin's own calls, and it can be unwrapped by itself.
    with encoder.condition(text), pytest.raises(MissingContextError):
        twin(images)
    covft.unwrap(twin)
    assert torch.equal(features(twin.vit(images)), features(covft.unwrap(encoder)(images)))
    del kept


def test_twins__a_copy_shares_the_text_encoder_and_a_pickle_drops_it():
    encoder, images, _ = wrapped("timm-clip", hash_encoder())
    texts = ["what is it?", "where?", "how many?"]
    assert copy.deepcopy(encoder).text_encoder is encoder.text_encoder
    twin = pickle.loads(pickle.dumps(encoder))
    assert twin.text_encoder is None
    with pytest.raises(TextEncoderError, match="left behind by pickling"):
        twin(images, texts)
    with pytest.raises(ShapeError, match="width 16"):
        twin.set_text_encoder(covft.testing.HashTextEncoder(8))
    twin.set_text_encoder(hash_encoder())
    assert torch.equal(twin(images, texts), encoder(images, texts))


@pytest.mark.long
@pytest.mark.parametrize("name", ["timm-clip", "open_clip-native", "hf-clip"])
def test_compile__one_graph_and_the_same_numbers(name):
    encoder, images, text = wrapped(name)
    kwargs = {}
    if name.startswith("hf-"):
        kwargs = {"output_hidden_states": True}
        encoder(images, text, **kwargs)  # transformers installs its capture hooks in the first call
    eager = features(encoder(images, text, **kwargs))
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    output = compiled(images, text, **kwargs)
    assert torch.allclose(features(output), eager, atol=1e-5)
    if kwargs:
        assert len(output.hidden_states) == len(encoder(images, text, **kwargs).hidden_states)
    other = torch.randn(3, TEXT_DIM)
    assert torch.allclose(
        features(compiled(images, other, **kwargs)), features(encoder(images, other, **kwargs)), atol=1e-5
    )
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.long
@pytest.mark.parametrize("complete", [True, False], ids=["encoder", "block"])
@pytest.mark.parametrize("routing", ["dense", "sparse"])
def test_compile__new_texts_and_batch_sizes_need_no_new_graphs(routing, complete):
    import torch._dynamo.testing

    tower = BY_NAME["timm-clip"]
    encoder = covft.wrap(tower.build(), TEXT_DIM, layers=[1], routing=routing)
    perturb(encoder)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = encoder if complete else encoder.slots()[1]
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    # Sparse routing chooses rows by value.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=routing == "sparse"):
        for batch in (2, 2, 3, 5, 4, 7):
            text = torch.randn(batch, TEXT_DIM)
            if complete:
                images = tower.images(batch)
                found, wanted = compiled(images, text), encoder(images, text)
            else:
                tokens = torch.randn(batch, 5, module.embed_dim)
                with encoder.condition(text):
                    found, wanted = compiled(tokens), module(tokens)
            assert torch.allclose(found, wanted, atol=1e-5)
    # One for the first size, one for all sizes.
    assert counter.frame_count == 2


@pytest.mark.long
def test_compile__gradients_are_the_same():
    encoder, images, text = wrapped("timm-clip")
    encoder.double().train()
    images, text = images.double(), text.double()
    encoder(images, text).square().sum().backward()
    wanted = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    torch._dynamo.reset()
    torch.compile(encoder, fullgraph=True, backend="aot_eager")(images, text).square().sum().backward()
    found = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=0, atol=1e-12) for name in wanted)


@pytest.mark.slow
def test_compile__inductor():
    encoder, images, text = wrapped("timm-clip")
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True)
    assert torch.allclose(compiled(images, text), encoder(images, text), atol=1e-4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tower", TOWERS, ids=str)
def test_bfloat16_and_autocast__stay_finite(tower):
    inputs = tower.inputs(2)
    encoder = covft.wrap(tower.build(), TEXT_DIM).train()
    perturb(encoder)
    images, text = tower.images(2), torch.randn(2, TEXT_DIM)
    with torch.autocast("cpu", torch.bfloat16):
        output = encoder(images, text, **inputs)
    loss = features(output).float().square().mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    half = covft.wrap(tower.build().to(torch.bfloat16), TEXT_DIM)
    output = features(half(images.to(torch.bfloat16), text, **inputs))
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    assert all(w.dtype == torch.float32 for w in half.routing_weights().values())


# Calls


def test_call__by_keyword_and_by_condition():
    encoder, images, text = wrapped("hf-clip")
    one = encoder(images, text).last_hidden_state
    assert torch.equal(one, encoder(pixel_values=images, text=text).last_hidden_state)
    with encoder.condition(text):
        assert torch.equal(one, encoder.vit(pixel_values=images).last_hidden_state)
        assert torch.equal(one, encoder(images).last_hidden_state)
    as_tuple = encoder(images, text, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], one)


def test_call__strings_and_their_features_are_the_same():
    encoder, images, _ = wrapped("timm-clip", hash_encoder())
    texts = ["what is it?", "where is it?", "what is it?"]
    by_features = encoder(images, encoder.encode_text(texts))
    assert torch.equal(encoder(images, texts), by_features)
    assert torch.equal(encoder(images, texts[:2], index=[0, 1, 0]), by_features)
    assert encoder.encode_text("one").shape == (1, TEXT_DIM)
    with pytest.raises(TextEncoderError, match="empty"):
        encoder(images, ["what?", " ", "where?"])
    with pytest.raises(ShapeError, match="index= was given without text"):
        encoder(images, index=[0, 0, 0])
    with pytest.raises(ShapeError, match="floating-point"):
        encoder(images, torch.zeros(3, TEXT_DIM, dtype=torch.long))


def test_call__without_a_text_encoder_strings_are_refused():
    encoder, images, _ = wrapped("timm-clip")
    with pytest.raises(TextEncoderError, match="features"):
        encoder(images, ["what?"] * 3)


def test_records__routing_and_context_of_the_last_forward():
    encoder, images, text = wrapped("hf-clip")
    assert encoder.routing_weights() == {}
    assert encoder.context_vectors() == {}
    encoder.train()(images, text)
    weights, contexts = encoder.routing_weights(), encoder.context_vectors()
    assert list(weights) == list(contexts) == [1, 2]
    for layer in weights:
        assert weights[layer].shape == (3, 4)
        assert contexts[layer].shape == (3, TEXT_DIM)
        assert torch.allclose(weights[layer].sum(-1), torch.ones(3))
        assert not weights[layer].requires_grad
        gate = encoder.slots()[layer].router.gate
        assert torch.allclose(weights[layer], gate(contexts[layer]).softmax(-1))


def test_aux_loss__is_the_mean_over_layers_and_reaches_the_router():
    encoder, images, text = wrapped("hf-clip", routing="sparse", top_k=1)
    with pytest.raises(MissingContextError, match="has not run yet"):
        encoder.aux_loss()
    encoder.train()(images, text)
    loss = encoder.aux_loss()
    records = [slot.record.routing for slot in encoder.slots().values()]
    by_hand = torch.stack([load_balance_loss(r.logits_BE, r.expert_ids_BK) for r in records]).mean()
    assert torch.equal(loss, by_hand)
    loss.backward()
    assert all(slot.router.gate.weight.grad.abs().max() > 0 for slot in encoder.slots().values())
    dense, images, text = wrapped("hf-clip")
    assert dense.aux_loss() == 0


# In the place of the ViT


def test_attributes__of_the_vit_answer_through_the_encoder():
    encoder, _, _ = wrapped("hf-clip")
    assert encoder.config is encoder.vit.config
    assert encoder.dtype == torch.float32
    assert encoder.main_input_name == "pixel_values"
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = encoder.nothing_like_this
    timm_encoder, _, _ = wrapped("timm-clip")
    assert timm_encoder.embed_dim == 32


def test_attributes__of_an_ffn_answer_from_expert_0():
    slot = wrapped("hf-clip")[0].slots()[1]
    assert slot.fc1 is slot.experts[0].fc1
    native = wrapped("open_clip-native")[0]
    assert native.vit.transformer.get_cast_dtype() == torch.float32
    with pytest.raises(AttributeError):
        _ = slot.fc3


def test_text_encoder__is_not_part_of_the_state():
    class Frozen(nn.Module):
        name, text_dim = "frozen", TEXT_DIM

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(1, TEXT_DIM)

        def encode(self, texts):
            return self.table(torch.tensor([[float(len(text))] for text in texts])).detach()

    texts = Frozen()
    encoder, _, _ = wrapped("timm-clip", texts)
    assert encoder.text_encoder is texts
    assert not any("table" in name for name in encoder.state_dict())
    assert texts not in set(encoder.modules())
    encoder.double()
    assert texts.table.weight.dtype == torch.float32


def test_trainable_parameters__printed_and_grouped(capsys):
    encoder, _, _ = wrapped("hf-clip")
    trained = list(encoder.trainable_parameters())
    encoder.print_trainable_parameters()
    count = sum(p.numel() for p in trained)
    assert f"trainable params: {count:,} || all params: {sum(p.numel() for p in encoder.parameters()):,}" in (
        capsys.readouterr().out
    )
    groups = encoder.param_groups(lr=1e-3, experts_lr=2e-3, router_lr=3e-3, norms_lr=4e-3, weight_decay=0.1)
    grouped = [p for group in groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, trained))
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {
        "norms/no_decay": (4e-3, 0.0),
        "experts/decay": (2e-3, 0.1),
        "experts/no_decay": (2e-3, 0.0),
        "router/decay": (3e-3, 0.1),
        "router/no_decay": (3e-3, 0.0),
    }
    torch.optim.AdamW(groups)


def test_merge__is_refused_with_its_reason():
    with pytest.raises(MergeError, match="depend on the image and the text"):
        wrapped("timm-clip")[0].merge()


def test_gradient_checkpointing__needs_a_switch():
    encoder = covft.wrap(covft.testing.ToyViT(), 4)
    with pytest.raises(UnsupportedViTError, match="no switch for activation checkpointing"):
        encoder.gradient_checkpointing_enable()


@pytest.mark.parametrize("name", ["timm-clip", "open_clip-native", "hf-clip"])
def test_gradient_checkpointing__saves_memory_and_can_be_switched_off(name):
    encoder, images, text = wrapped(name)
    encoder.train()

    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            features(encoder(images, text))
        return sum(sizes)

    plain = kept()
    encoder.gradient_checkpointing_enable()
    assert kept() < 0.5 * plain
    encoder.gradient_checkpointing_disable()
    assert kept() == plain


# The Hub


def test_push_to_hub__uploads_what_save_pretrained_writes(monkeypatch):
    import huggingface_hub

    calls: list[tuple] = []

    class FakeApi:
        def __init__(self, token=None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id, **kwargs):
            calls.append(("create", repo_id, kwargs))

        def upload_folder(self, repo_id, folder_path, **kwargs):
            calls.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir()), kwargs))
            return "the address of the commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    encoder = covft.wrap(covft.testing.ToyViT(), 4)
    assert (
        encoder.push_to_hub("me/mine", private=True, token="secret", commit_message="x") == "the address of the commit"
    )
    files = ["README.md", "covft_config.json", "model.safetensors"]
    assert calls == [
        ("token", "secret"),
        ("create", "me/mine", {"private": True, "exist_ok": True}),
        ("upload", "me/mine", files, {"commit_message": "x"}),
    ]


def test_load__from_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    encoder = covft.wrap(covft.testing.ToyViT().eval(), 4)
    vit = copy.deepcopy(encoder)
    perturb(encoder)
    encoder.save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(tmp_path))
    loaded = covft.load("me/mine", covft.unwrap(vit), 4)
    images, text = torch.randn(2, 3, 16, 16), torch.randn(2, 4)
    assert torch.equal(loaded(images, text), encoder(images, text))


def test_load__a_repository_that_cannot_be_reached_says_what_to_do():
    with pytest.raises(CheckpointError, match="hf download me/nothing"):
        covft.load("me/nothing", covft.testing.ToyViT(), 4)
