"""Attached models of LLaVA and LLaVA-NeXT: the question of the right row for every image."""

import copy

import pytest
import torch

import covft
from covft.errors import (
    ConfigError,
    MissingContextError,
    ShapeError,
    UnsupportedViTError,
)
from covft.integrations.codebases import llava as launcher
from covft.integrations.mllm.attachment import NO_IMAGE
from covft.testing import HashTextEncoder
from tests.helpers.codebases import SIZE, stir, texts_seen
from tests.helpers.llava_code import LAYERS, QUESTIONS, attached, batch_of, build

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("version", ["v0", "v1", "mpt", "qwen_1_5", "llava_llama_2"])
def test_the_question_is_read_from_prompts_of_every_conversation(llava_code, llava_home, monkeypatch, version):
    model, tokenizer, conversation = attached(llava_home, version)
    seen = texts_seen(model, monkeypatch)
    batch = batch_of(tokenizer, conversation, QUESTIONS[:2], [1, 1])
    model(**batch, images=torch.randn(2, 3, SIZE, SIZE))
    assert seen == [QUESTIONS[:2]]


def test_nothing_changes_at_the_start(llava_code, llava_home):
    model, tokenizer, conversation = build(llava_home)
    batch = batch_of(tokenizer, conversation, QUESTIONS, [1, 0, 2])
    images = torch.randn(4, 3, SIZE, SIZE)
    before = model(**batch, images=images).logits
    launcher.attach(model, HashTextEncoder(16), tokenizer=tokenizer, conversation=conversation, layers=LAYERS)
    torch.testing.assert_close(model(**batch, images=images).logits, before, rtol=1e-4, atol=1e-5)


def test_detach__gives_the_model_back(llava_code, llava_home):
    model, tokenizer, conversation = build(llava_home)
    batch = batch_of(tokenizer, conversation, QUESTIONS[:1], [1])
    images = torch.randn(1, 3, SIZE, SIZE)
    logits = model(**batch, images=images).logits
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    launcher.attach(model, HashTextEncoder(16), tokenizer=tokenizer, conversation=conversation, layers=LAYERS)
    stir(covft.get_encoder(model))
    method = model.save_pretrained
    model.save_pretrained = lambda *args, **kwargs: method(*args, **kwargs)
    with pytest.raises(UnsupportedViTError, match=r"replaced model\.save_pretrained"):
        covft.detach(model)
    model.save_pretrained = method
    covft.detach(model)
    assert not [name for name, module in model.named_modules() if set(vars(module)) - before[name]]
    assert torch.equal(model(**batch, images=images).logits, logits)


@pytest.mark.parametrize(("kind", "tower"), [("LlavaLlamaForCausalLM", None), ("LlavaQwenForCausalLM", "next")])
def test_each_image_has_the_question_of_its_row(llava_code, llava_home, monkeypatch, kind, tower):
    """Rows with none, one and two images, each of another number of crops: compared with texts given by hand."""
    model, tokenizer, conversation = attached(llava_home, kind=kind, tower=tower)
    encoder = covft.get_encoder(model)
    stir(encoder)
    batch = batch_of(tokenizer, conversation, QUESTIONS, [2, 0, 1])
    images = [torch.randn(n, 3, SIZE, SIZE) for n in (1, 3, 1, 2)]
    seen = texts_seen(model, monkeypatch)
    first = model(**batch, images=images).logits
    assert seen == [[QUESTIONS[0]] * 4 + [NO_IMAGE] + [QUESTIONS[2]] * 2]

    with encoder.condition(["x", QUESTIONS[0], QUESTIONS[2]], torch.tensor([1, 1, 1, 1, 0, 2, 2])):
        torch.testing.assert_close(model(**batch, images=images).logits, first)
    # The text of an image that stands for none matters to no output; that of a real one to its row alone.
    with encoder.condition(["other", QUESTIONS[0], QUESTIONS[2]], torch.tensor([1, 1, 1, 1, 1, 0, 0])):
        other = model(**batch, images=images).logits
    torch.testing.assert_close(other[:2], first[:2])
    assert (other[2] - first[2]).abs().max() > 1e-4


def test_images_as_one_tensor_of_stacks(llava_code, llava_home, monkeypatch):
    model, tokenizer, conversation = attached(llava_home)
    seen = texts_seen(model, monkeypatch)
    batch = batch_of(tokenizer, conversation, QUESTIONS[:2], [1, 1])
    model(**batch, images=torch.randn(2, 3, 3, SIZE, SIZE))
    assert seen == [[QUESTIONS[0]] * 3 + [QUESTIONS[1]] * 3]


def test_placeholders_in_the_padding_do_not_count(llava_code, llava_home, monkeypatch):
    model, tokenizer, conversation = attached(llava_home)
    batch = batch_of(tokenizer, conversation, QUESTIONS[:2], [1, 1])
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 1), value=-200)
    batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 1))
    seen = texts_seen(model, monkeypatch)
    model(**batch, images=torch.randn(2, 3, SIZE, SIZE))
    assert seen == [QUESTIONS[:2]]


def test_generation_reads_once_and_the_tower_runs_once(llava_code, llava_home, monkeypatch):
    model, tokenizer, conversation = attached(llava_home)
    stir(covft.get_encoder(model))
    batch = batch_of(tokenizer, conversation, QUESTIONS[:1], [1])
    image = torch.randn(1, 3, SIZE, SIZE)
    seen = texts_seen(model, monkeypatch)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answer = model.generate(batch["input_ids"], images=image, **options)
    assert seen == [QUESTIONS[:1]]
    assert answer.shape[1] >= 4
    with torch.no_grad():
        expected = model(**batch, images=image).logits[0, -1].argmax()
    assert answer[0, -4] == expected
    model.generate(batch_of(tokenizer, conversation, QUESTIONS[:1], [0])["input_ids"], **options)
    assert len(seen) == 2


def checkpoint(model):
    """By the switch that Trainer turns, in transformers 4 and 5."""
    for kind in ("activation", "gradient"):
        if hasattr(model, f"{kind}_checkpointing_enable"):
            options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(model, f"{kind}_checkpointing_enable")(**options)
            return


def test_gradients_reach_everything_and_are_those_of_texts_given_by_hand(llava_code, llava_home):
    model, tokenizer, conversation = attached(llava_home)
    encoder = covft.get_encoder(model)
    stir(encoder)
    model.train()
    batch = batch_of(tokenizer, conversation, QUESTIONS, [1, 0, 2])
    batch["labels"] = batch["input_ids"].clone()
    images = torch.randn(4, 3, SIZE, SIZE)

    def gradients(checkpointed, by_hand=False):
        model.zero_grad()
        if checkpointed:
            checkpoint(model)
        if by_hand:
            index = torch.tensor([0, 1, 2, 2])
            with encoder.condition([QUESTIONS[0], "nobody reads this", QUESTIONS[2]], index):
                model(**batch, images=images).loss.backward()
        else:
            model(**batch, images=images).loss.backward()
        return {name: p.grad.clone() for name, p in encoder.vit.named_parameters() if p.requires_grad}

    plain, checkpointed, by_hand = gradients(False), gradients(True), gradients(False, by_hand=True)
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
        torch.testing.assert_close(by_hand[name], gradient)


def test_a_batch_of_text_alone_gives_gradients_of_zero(llava_code, llava_home):
    """So that every process has the same graph."""
    model, tokenizer, conversation = attached(llava_home)
    model.train()
    batch = batch_of(tokenizer, conversation, QUESTIONS[:2], [0, 0])
    model(**batch, labels=batch["input_ids"], images=torch.zeros(2, 3, SIZE, SIZE)).loss.backward()
    for parameter in covft.get_encoder(model).trainable_parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_rows_without_an_instruction(llava_code, llava_home, monkeypatch):
    model, tokenizer, conversation = attached(llava_home)
    batch = batch_of(tokenizer, conversation, [QUESTIONS[0], ""], [1, 1])
    images = torch.randn(2, 3, SIZE, SIZE)
    with pytest.raises(MissingContextError, match="user turns in row 1 of the prompt are empty"):
        model(**batch, images=images)
    model, tokenizer, conversation = attached(llava_home, empty_instruction="describe the image.")
    seen = texts_seen(model, monkeypatch)
    model(**batch, images=images)
    assert seen == [[QUESTIONS[0], "describe the image."]]


def test_answers_are_not_read(llava_code, llava_home, monkeypatch):
    from llava.mm_utils import tokenizer_image_token

    model, tokenizer, conversation = attached(llava_home)
    turns = conversation.copy()
    for role, text in zip(turns.roles * 2, ["<image>\nwhat is that?", "a cup", "and this?", "a ball"], strict=True):
        turns.append_message(role, text)
    ids = torch.tensor([tokenizer_image_token(turns.get_prompt(), tokenizer)])
    seen = texts_seen(model, monkeypatch)
    model(input_ids=ids, images=torch.randn(1, 3, SIZE, SIZE))
    assert seen == [["what is that? and this?"]]


def test_what_does_not_add_up(llava_code, llava_home):
    model, tokenizer, conversation = attached(llava_home)
    batch = batch_of(tokenizer, conversation, QUESTIONS, [1, 0, 2])
    with pytest.raises(ShapeError, match="do not add up"):
        model(**batch, images=torch.randn(3, 3, SIZE, SIZE))


def test_what_cannot_be_attached(llava_code, llava_home):
    model, tokenizer, conversation = build(llava_home, tower="s2")
    arguments = {"tokenizer": tokenizer, "conversation": conversation}
    with pytest.raises(UnsupportedViTError, match="several scales"):
        launcher.attach(model, 16, **arguments)
    model, tokenizer, conversation = build(llava_home)
    with pytest.raises(UnsupportedViTError, match="not a model of LLaVA"):
        launcher.attach(model.get_model().get_vision_tower(), 16, **arguments)
    with pytest.raises(ConfigError, match="cannot be read"):
        launcher.attach(model, 16, tokenizer=tokenizer, conversation="plain")
    model.get_model().vision_tower = [model.get_model()._modules.pop("vision_tower")]
    with pytest.raises(UnsupportedViTError, match="hidden"):
        launcher.attach(model, 16, **arguments)
    model, *_ = attached(llava_home)
    with pytest.raises(UnsupportedViTError, match="attached already"):
        launcher.attach(model, 16, **arguments)


def test_a_copy_has_a_tower_of_its_own(llava_code, llava_home):
    model, tokenizer, conversation = attached(llava_home)
    twin = copy.deepcopy(model)
    stir(covft.get_encoder(twin))
    batch = batch_of(tokenizer, conversation, QUESTIONS[:2], [1, 1])
    images = torch.randn(2, 3, SIZE, SIZE)
    twin.train()
    twin(**batch, labels=batch["input_ids"], images=images).loss.backward()
    assert all(p.grad is not None for p in covft.get_encoder(twin).trainable_parameters())
    assert all(p.grad is None for p in covft.get_encoder(model).trainable_parameters())
    assert (twin.eval()(**batch, images=images).logits - model(**batch, images=images).logits).abs().max() > 1e-4


def test_sparse_routing__the_load_balancing_loss_is_in_the_loss_of_training(llava_code, llava_home):
    model, tokenizer, conversation = attached(llava_home, routing="sparse", experts=3, top_k=1)
    encoder = covft.get_encoder(model)
    batch = batch_of(tokenizer, conversation, QUESTIONS[:2], [1, 1])
    given = {**batch, "labels": batch["input_ids"], "images": torch.randn(2, 3, SIZE, SIZE)}
    plain = model.eval()(**given).loss
    loss = model.train()(**given).loss
    torch.testing.assert_close(loss - plain, 0.01 * encoder.aux_loss(), rtol=1e-2, atol=1e-5)
    loss.backward()
