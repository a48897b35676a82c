"""LLaVA and InternVL are their parts, and settings that cannot work."""

import copy

import pytest
import torch
from torch import nn

from covft.errors import ConfigError, UnsupportedViTError
from covft.integrations import build_internvl, build_llava, image_text_of, llava_processor, load_image_processor
from covft.utils.transformers_names import saved_names
from tests.helpers.building import (
    GRID,
    LANGUAGE,
    LLMS,
    PREFIX,
    SIZE,
    TOWERS,
    VISION,
    WIDTH,
    prompt,
    published,
    save_published,
)
from tests.helpers.releases import skip_before


def naive_logits(model, tower, llm, batch, *, dropped, layer, projector):
    """LLaVA written out: a hidden state of the tower, through the projector, in the places of the image tokens."""
    states = tower(batch["pixel_values"], **({} if layer == -1 else {"output_hidden_states": True}))
    state = states.last_hidden_state if layer == -1 else states.hidden_states[layer]
    features = projector(state[:, dropped:])
    embeddings = llm.get_input_embeddings()(batch["input_ids"]).clone()
    for row in range(len(embeddings)):
        places = (batch["input_ids"][row] == model.config.image_token_id).nonzero()[:, 0]
        for number, place in enumerate(places.tolist()):
            embeddings[row, place] = features[row, number]
    return llm(inputs_embeds=embeddings).logits


def two_layers(model):
    projector = model.model.multi_modal_projector

    def apply(x):
        inner = nn.functional.gelu(x @ projector.linear_1.weight.T + projector.linear_1.bias)
        return inner @ projector.linear_2.weight.T + projector.linear_2.bias

    return apply


@pytest.mark.parametrize(
    ("vision", "language"),
    [
        ("clip", "llama"),
        *(pytest.param(tower, "llama", marks=pytest.mark.long) for tower in TOWERS if tower != "clip"),
        *(pytest.param("clip", llm, marks=pytest.mark.long) for llm in LLMS if llm != "llama"),
    ],
)
def test_llava_is_its_parts(parts, tokenizer, tmp_path, vision, language):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if vision == "internvit":
        skip_before((5, 0), "an InternViT that gives LLaVA hidden states")
    model = build_llava(parts / vision, parts / language, tokenizer)
    loaded = TOWERS[vision](None)[0]
    whole = type(loaded).from_pretrained(parts / vision)
    tower = getattr(whole, "vision_model", whole)
    llm = AutoModelForCausalLM.from_pretrained(parts / language)
    for saved, ours in ((tower, model.model.vision_tower), (llm.base_model, model.model.language_model)):
        ours = {saved_names(ours)(name): tensor for name, tensor in ours.state_dict().items()}
        for name, tensor in saved.state_dict().items():
            if "embed_tokens" not in name:
                torch.testing.assert_close(ours[saved_names(saved)(name)], tensor, rtol=0, atol=0)
    rows = LANGUAGE["vocab_size"]
    for saved, ours in (
        (llm.get_input_embeddings(), model.get_input_embeddings()),
        (llm.lm_head, model.lm_head),
    ):
        torch.testing.assert_close(ours.weight[:rows], saved.weight, rtol=0, atol=0)
        assert len(ours.weight) % 64 == 0
        assert len(ours.weight) >= len(tokenizer)
        for row in ours.weight[rows:]:
            torch.testing.assert_close(row, saved.weight.mean(0))
    tied = LLMS[language][1]["tie_word_embeddings"]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied

    prefix, kept = PREFIX[vision]
    assert model.config.image_seq_length == GRID**2 + kept
    assert model.config.vision_feature_select_strategy == ("default" if prefix else "full")
    batch = prompt(model, tokenizer)
    logits = model(**batch).logits
    llm.resize_token_embeddings(len(model.lm_head.weight), mean_resizing=False)
    llm.get_input_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    llm.lm_head.weight.data.copy_(model.lm_head.weight)
    naive = naive_logits(
        model, tower, llm, batch, dropped=prefix - kept, layer=-2, projector=two_layers(model)
    )  # fmt: skip
    torch.testing.assert_close(logits, naive, rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model)
    assert {key: value for key, value in info.items() if value} == {}
    torch.testing.assert_close(again(**batch).logits, logits)
    answer = again.generate(**batch, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > batch["input_ids"].shape[1]
    assert again.generation_config.pad_token_id == tokenizer.pad_token_id


def test_internvl_is_its_parts(parts, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, InternVLVisionModel

    model = build_internvl(parts / "internvit", parts / "phi3", tokenizer)
    assert model.config.image_seq_length == GRID**2 // 4
    tower = InternVLVisionModel.from_pretrained(parts / "internvit")
    llm = AutoModelForCausalLM.from_pretrained(parts / "phi3")
    llm.resize_token_embeddings(len(model.lm_head.weight), mean_resizing=False)
    llm.get_input_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    llm.lm_head.weight.data.copy_(model.lm_head.weight)
    projector = model.model.multi_modal_projector

    def project(x):  # four neighbours side by side, column after column of a square
        grid = x.reshape(len(x), GRID, GRID, WIDTH)
        squares = [grid[:, i::2, j::2] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))]
        return projector.linear_2(
            nn.functional.gelu(projector.linear_1(projector.layer_norm(torch.cat(squares, -1).flatten(1, 2))))
        )

    batch = prompt(model, tokenizer)
    logits = model(**batch).logits
    naive = naive_logits(model, tower, llm, batch, dropped=1, layer=-1, projector=project)
    torch.testing.assert_close(logits, naive, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    torch.testing.assert_close(again(**batch).logits, logits)
    text = image_text_of(again, tokenizer)
    assert text(2) == "<img>" + "<IMG_CONTEXT>" * 8 + "</img>"
    assert text.token_id(tokenizer) == model.config.image_token_id


def test_internvl_takes_internvit_as_published(parts, tokenizer, tmp_path):
    save_published(tmp_path, *published())
    model = build_internvl(tmp_path, parts / "llama", tokenizer, dtype=torch.float64)
    batch = prompt(model, tokenizer)
    model(**{**batch, "pixel_values": batch["pixel_values"].double()}).logits.sum().backward()
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())
    assert model.model.vision_tower.get_parameter("encoder.layer.0.lambda_1").grad is not None


def test_loaded_parts_serve_too_and_are_not_copied(parts, tokenizer):
    from transformers import AutoModelForCausalLM, Dinov2Model

    tower = Dinov2Model.from_pretrained(parts / "dinov2")
    llm = AutoModelForCausalLM.from_pretrained(parts / "qwen2")
    model = build_llava(tower, llm, tokenizer, image_size=64)
    assert model.model.vision_tower is tower
    assert model.model.language_model is llm.model
    assert model.config.image_seq_length == 64
    batch = prompt(model, tokenizer)
    model(**{**batch, "pixel_values": torch.rand(2, 3, 64, 64)})


def test_dtype_and_attention_reach_both_parts(parts, tokenizer):
    model = build_llava(
        parts / "clip", parts / "llama", tokenizer, dtype=torch.bfloat16, attn_implementation="eager"
    )  # fmt: skip
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "eager"
    sdpa = build_llava(parts / "clip", parts / "llama", tokenizer, attn_implementation="sdpa")
    assert sdpa.model.vision_tower.config._attn_implementation == "sdpa"
    assert {p.dtype for p in sdpa.parameters()} == {torch.float32}


def test_parts_of_two_dtypes_meet_in_that_of_the_language_model(parts, tokenizer):
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(parts / "llama", dtype=torch.bfloat16)
    model = build_llava(parts / "clip", llm, tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = prompt(model, tokenizer)
    assert model(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()}).logits.isfinite().all()


def test_a_tokenizer_without_padding_gets_one(parts, tokenizer):
    tokenizer.pad_token = None
    model = build_llava(parts / "clip", parts / "llama", tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert model.generation_config.pad_token_id == tokenizer.eos_token_id


def test_embeddings_that_have_room_stay(parts, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    llm = LlamaForCausalLM(LlamaConfig(**{**LANGUAGE, "vocab_size": 500}))
    before = llm.get_input_embeddings().weight.detach().clone()
    model = build_llava(parts / "clip", llm, tokenizer)
    torch.testing.assert_close(model.get_input_embeddings().weight, before, rtol=0, atol=0)
    assert model.config.text_config.vocab_size == 500


def test_the_processor_writes_as_many_placeholders_as_there_are_features(parts, tmp_path, tokenizer):
    from PIL import Image
    from transformers import AutoProcessor, CLIPImageProcessor

    for vision in ("clip", "dinov3", "siglip"):
        CLIPImageProcessor().save_pretrained(parts / vision)  # of 224 pixels, which these towers are not for
        model = build_llava(parts / vision, parts / "llama", tokenizer)
        processor = llava_processor(model, tokenizer, load_image_processor(parts / vision, SIZE))
        processor.save_pretrained(tmp_path / vision)
        processor = AutoProcessor.from_pretrained(tmp_path / vision)
        inputs = processor(images=Image.new("RGB", (50, 40)), text="<image> what is left?", return_tensors="pt")
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == model.config.image_seq_length
        assert inputs["pixel_values"].shape == (1, 3, SIZE, SIZE)
        model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")})
        assert processor.chat_template == tokenizer.chat_template


def test_covft_goes_into_an_assembled_model(parts, tokenizer):
    import covft
    from covft.testing import HashTextEncoder

    for model in (
        build_llava(parts / "dinov3", parts / "phi3", copy.deepcopy(tokenizer)),
        build_internvl(parts / "internvit", parts / "qwen2", tokenizer),
    ):
        batch = prompt(model, tokenizer)
        before = model(**batch).logits
        covft.attach(model, HashTextEncoder(16), tokenizer=tokenizer, layers=[1, 2])
        after = model(**batch, context_text=["what is left?", "how many?"]).logits
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
        covft.get_encoder(model).train()
        model(**batch, context_text=["what is left?", "how many?"]).logits.square().mean().backward()
        assert all(p.grad is not None for p in covft.get_encoder(model).trainable_parameters())


def test_settings_that_cannot_work_are_refused_before_anything_changes(parts, tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    words = len(tokenizer)
    small = {key: value for key, value in LANGUAGE.items() if key != "max_position_embeddings"}
    gemma = Gemma2ForCausalLM(Gemma2Config(**small, head_dim=8))
    empty = LlamaForCausalLM(LlamaConfig(**LANGUAGE)).to("meta")
    tokenizer.add_tokens(["<new>"])
    for options, match in (
        ({"feature_layer": -6}, r"feature_layer=-6.*"),
        ({"image_size": 48}, "does not take images of 48 x 48"),
        ({"language": gemma}, "final_logit_softcapping"),
        ({"language": empty}, "not all on this process"),
    ):
        with pytest.raises(ConfigError, match=match):
            build_llava(**{"vision": parts / "clip", "language": parts / "llama", "tokenizer": tokenizer, **options})
    with pytest.raises(ConfigError, match="does not take images of 60 x 60"):
        build_llava(parts / "dinov3", parts / "llama", tokenizer, image_size=60)
    with pytest.raises(UnsupportedViTError, match="supports only InternViT"):
        build_internvl(parts / "clip", parts / "llama", tokenizer)
    for ratio in (0.3, 1 / 3, 2):
        with pytest.raises(ConfigError, match="does not divide a grid of 4 x 4"):
            build_internvl(parts / "internvit", parts / "llama", tokenizer, downsample_ratio=ratio)
    assert len(tokenizer) == words + 1


def test_a_part_of_another_class_is_refused(parts, tokenizer):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))
    with pytest.raises(UnsupportedViTError, match="CLIPVisionModelWithProjection as its vision part"):
        build_llava(tower, parts / "llama", tokenizer)


def test_a_tower_that_gives_no_hidden_states_is_refused(parts, tokenizer):
    """As the InternViT of transformers 4.57; LLaVA would fail at its first image."""
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(parts / "clip")
    plain = tower.forward
    tower.forward = lambda pixel_values: plain(pixel_values)
    llm = AutoModelForCausalLM.from_pretrained(parts / "llama")
    before = len(tokenizer)
    with pytest.raises(UnsupportedViTError, match="cannot be the tower of a LLaVA"):
        build_llava(tower, llm, tokenizer)
    assert len(tokenizer) == before
