"""internvl_chat: the launcher runs its training and evaluation, which a stand-in plays."""

import copy

import pytest
import torch

import covft
from covft.errors import ConfigError, MissingContextError, ShapeError, UnsupportedViTError
from covft.integrations.codebases import internvl as launcher
from covft.integrations.mllm.attachment import NO_IMAGE
from covft.testing import HashTextEncoder
from tests.helpers.codebases import rows, stir, texts_seen, write_json
from tests.helpers.prompts import tokenizer_of

transformers = pytest.importorskip("transformers")

SIZE = 32
QUESTIONS = ["what is left of the cup?", "how many people are there?", "where is the dog?"]
TEMPLATE_OF = {"internvl2_5": "chatml", "Hermes-2": "chatml", "phi3-chat": "phi-3"}


def tokenizer_for(style):
    tokenizer = copy.deepcopy(tokenizer_of(TEMPLATE_OF[style], "byte-level"))
    tokenizer.chat_template = None
    tokenizer.add_tokens(["<img>", "</img>", "<IMG_CONTEXT>"], special_tokens=True)
    return tokenizer


def build(style="internvl2_5", select_layer=-1):
    from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel

    tokenizer = tokenizer_for(style)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    llm = {**sizes, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    llm["pad_token_id"] = tokenizer.pad_token_id
    torch.manual_seed(4)
    model = InternVLChatModel(InternVLChatConfig(llm_config=llm, select_layer=select_layer, template=style))
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return model.eval(), tokenizer


def attached(style="internvl2_5", **settings):
    model, tokenizer = build(style)
    launcher.attach(model, HashTextEncoder(16), tokenizer=tokenizer, **{"layers": (1, 2), **settings})
    return model, tokenizer


def batch_of(model, tokenizer, questions, tiles):
    """Rows with so many tiles each; a row with none has a dummy."""
    from internvl.train.internvl_chat_finetune import concat_pad_data_collator

    features = []
    for question, count in zip(questions, tiles, strict=True):
        turn = model.conv_template.copy()
        image = "<img>" + "<IMG_CONTEXT>" * model.num_image_token * count + "</img>\n" if count else ""
        turn.append_message(turn.roles[0], image + question)
        turn.append_message(turn.roles[1], None)
        ids = torch.tensor(tokenizer(turn.get_prompt(), add_special_tokens=False)["input_ids"])
        number = max(count, 1)
        pixels, flags = torch.randn(number, 3, SIZE, SIZE), torch.tensor([int(count > 0)] * number)
        features.append({"input_ids": ids, "labels": ids, "pixel_values": pixels, "image_flags": flags})
    return concat_pad_data_collator(features, tokenizer.pad_token_id)


@pytest.mark.parametrize("style", list(TEMPLATE_OF))
def test_tiles_have_the_question_of_their_row(internvl_code, monkeypatch, style):
    model, tokenizer = build(style)
    batch = batch_of(model, tokenizer, QUESTIONS, [3, 0, 2])
    before = model(**batch).logits
    launcher.attach(model, HashTextEncoder(16), tokenizer=tokenizer, layers=(1, 2))
    encoder = covft.get_encoder(model)
    assert encoder.spec.input.prefix_tokens == 1
    seen = texts_seen(model, monkeypatch)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)
    assert seen == [[QUESTIONS[0]] * 3 + [NO_IMAGE] + [QUESTIONS[2]] * 2]

    stir(encoder)
    first = model(**batch).logits
    with encoder.condition([QUESTIONS[0], "x", "other"], torch.tensor([0, 0, 0, 1, 2, 2])):
        other = model(**batch).logits
    torch.testing.assert_close(other[:2], first[:2])
    assert (other[2] - first[2]).abs().max() > 1e-4


def test_chat_and_batch_chat(internvl_code, monkeypatch):
    model, tokenizer = attached()
    seen = texts_seen(model, monkeypatch)
    options = {"max_new_tokens": 3, "do_sample": False}
    tiles = torch.randn(5, 3, SIZE, SIZE)
    model.chat(tokenizer, tiles, QUESTIONS[0], options)
    model.batch_chat(tokenizer, tiles, QUESTIONS[:2], options, num_patches_list=[2, 3])
    history = [(f"<image>\n{QUESTIONS[0]}", "a cup")]
    model.chat(tokenizer, tiles, QUESTIONS[1], options, history=history)
    model.chat(tokenizer, None, QUESTIONS[1], options)
    joined = f"{QUESTIONS[0]} {QUESTIONS[1]}"
    assert seen == [[QUESTIONS[0]] * 5, [QUESTIONS[0]] * 2 + [QUESTIONS[1]] * 3, [joined] * 5]


def test_features_that_are_given_need_no_text(internvl_code, monkeypatch):
    model, tokenizer = attached()
    batch = batch_of(model, tokenizer, QUESTIONS[:1], [2])
    with covft.get_encoder(model).condition("anything"):
        features = model.extract_feature(batch["pixel_values"])
    seen = texts_seen(model, monkeypatch)
    given = {"input_ids": batch["input_ids"], "visual_features": features.detach(), "max_new_tokens": 2}
    model.generate(pixel_values=batch["pixel_values"], **given)
    assert seen == []


def test_gradients_with_their_checkpointing(internvl_code):
    """Their encoder calls checkpoint() without saying which kind."""
    from internvl.model.internvl_chat.modeling_intern_vit import InternVisionEncoder

    model, tokenizer = attached()
    encoder = covft.get_encoder(model)
    stir(encoder)
    model.train()
    batch = batch_of(model, tokenizer, QUESTIONS, [3, 0, 2])

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in encoder.vit.named_parameters() if p.requires_grad}

    before = InternVisionEncoder.checkpoints
    checkpointed = gradients()
    assert InternVisionEncoder.checkpoints > before
    model.vision_model.encoder.gradient_checkpointing = False
    plain = gradients()
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_sparse_routing__the_load_balancing_loss_is_in_the_loss_of_training(internvl_code):
    model, tokenizer = attached(routing="sparse", experts=3, top_k=1)
    batch = batch_of(model, tokenizer, QUESTIONS[:2], [1, 2])
    plain = model.eval()(**batch).loss
    loss = model.train()(**batch).loss
    balance = covft.get_encoder(model).aux_loss()
    torch.testing.assert_close(loss - plain, 0.01 * balance, rtol=1e-2, atol=1e-5)
    loss.backward()


def test_dummies_alone_give_gradients_of_zero(internvl_code):
    model, tokenizer = attached()
    model.train()
    model(**batch_of(model, tokenizer, QUESTIONS[:2], [0, 0])).loss.backward()
    for parameter in covft.get_encoder(model).trainable_parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_another_layer_of_the_tower(internvl_code):
    model, tokenizer = build(select_layer=-2)
    batch = batch_of(model, tokenizer, QUESTIONS[:1], [1])
    before = model(**batch).logits
    launcher.attach(model, HashTextEncoder(16), tokenizer=tokenizer, layers=(1, 2))
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)


def test_what_does_not_add_up(internvl_code):
    model, tokenizer = attached()
    batch = batch_of(model, tokenizer, QUESTIONS, [3, 0, 2])
    with pytest.raises(ShapeError, match="do not add up"):
        model(**{**batch, "image_flags": torch.ones(6, dtype=torch.long)})
    with pytest.raises(ShapeError, match="do not add up"):
        model(**{**batch, "input_ids": batch["input_ids"][:, :10], "attention_mask": None, "labels": None})
    packed = {**batch, "input_ids": batch["input_ids"].reshape(1, -1), "attention_mask": torch.tensor([[0, 9, 20]])}
    with pytest.raises(ShapeError, match="packed"):
        model(**packed)
    positions = torch.arange(batch["input_ids"].shape[1]).repeat(3, 1)
    positions[0, 5:] -= 5
    with pytest.raises(ShapeError, match="packed"):
        model(**batch, position_ids=positions)
    with pytest.raises(MissingContextError):
        model(**batch_of(model, tokenizer, [""], [1]))


def test_what_cannot_be_attached(internvl_code):
    model, tokenizer = build()
    with pytest.raises(UnsupportedViTError, match="not an InternVLChatModel"):
        launcher.attach(model.language_model, 16, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="cannot be read"):
        launcher.attach(model, 16, tokenizer=tokenizer, conversation="plain")
    model.vision_model.peft_config = {}
    with pytest.raises(UnsupportedViTError, match="LoRA"):
        launcher.attach(model, 16, tokenizer=tokenizer)
    model, tokenizer = attached()
    with pytest.raises(UnsupportedViTError, match="attached already"):
        launcher.attach(model, 16, tokenizer=tokenizer)


# ------------------------------------------------------------------------------------- the launcher


@pytest.fixture
def home(internvl_code, tmp_path):
    model, tokenizer = build()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_json(tmp_path / "meta.json", rows(QUESTIONS[0], "~who are you?", QUESTIONS[1], QUESTIONS[2]))
    return tmp_path


def run(home, *flags, covft_flags=(), steps=2, **replaced):
    arguments = {
        "model_name_or_path": home / "base",
        "meta_path": home / "meta.json",
        "output_dir": home / "out",
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "freeze_backbone": True,
        **replaced,
    }
    theirs = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    ours = ["--covft_text_encoder", "hash:16", "--covft_layers", "1-2", *covft_flags]
    launcher.main([*ours, "--", "internvl.train.internvl_chat_finetune", *theirs, *flags])


@pytest.mark.filterwarnings("ignore")
def test_training_saving_and_evaluating(home, trainers):
    run(home)
    (trainer,) = trainers
    encoder = covft.get_encoder(trainer.model)
    for folder in ("out", "out/checkpoint-1", "out/checkpoint-2"):
        assert (home / folder / "covft" / "covft_config.json").is_file()
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in encoder.trainable_parameters()} <= in_optimizer

    torch.manual_seed(8)
    tiles = torch.randn(2, 3, SIZE, SIZE)
    torch.save(tiles, home / "tiles.pt")
    flags = ["--checkpoint", home / "out", "--question", QUESTIONS[0], "--image", home / "tiles.pt"]
    launcher.main(["--", "internvl.eval.evaluate_vqa", *map(str, flags), "--out", str(home / "features.pt")])
    with torch.no_grad(), encoder.condition(QUESTIONS[0]):
        expected = trainer.model.eval().extract_feature(tiles)
    torch.testing.assert_close(torch.load(home / "features.pt"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_run_ends_where_a_whole_one_does(home, trainers):
    run(home, steps=3, output_dir=home / "whole")
    run(home, steps=1, output_dir=home / "cut")
    run(home, steps=3, output_dir=home / "cut", resume_from_checkpoint=home / "cut" / "checkpoint-1")
    whole, _, resumed = trainers
    ends = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(ends[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_packed_data_are_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="Packed"):
        launcher.main(["--", "internvl.train.nothing", "--use_packed_ds", "True"])
    with pytest.raises(ConfigError, match="Packed"):
        launcher.main(["--", "internvl.train.nothing", "--use_packed_ds=True"])
