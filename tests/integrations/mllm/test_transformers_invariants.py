"""What transformers promises of its models holds for attached ones, too."""

from __future__ import annotations

import copy

import pytest
import torch

from covft.integrations import attach, get_encoder
from tests.helpers.attached import CUP, DOG, TEXTS, attached
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.recomputing import recompute
from tests.helpers.towers import perturb

pytestmark = pytest.mark.usefixtures("quiet")
NAMES = ["llava", "internvl", "qwen2_5_vl"]
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
IMAGES = ("pixel_values", "image_grid_thw")
every_model = pytest.mark.parametrize("name", NAMES)


def made(name, rows=None):
    return attached(name, rows or [Row(1, CUP), Row(1, DOG)], layers=[0])


def logits(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits


@pytest.mark.parametrize("text", [None, ["where?"] * 3], ids=["read", "per row"])
@every_model
def test_images_that_do_not_match_the_placeholders__are_the_error_of_a_plain_model(name, text):
    """The same type, and the same sentence, wherever the text comes from."""
    mllm = BY_NAME[name]
    plain = mllm.build()
    three = mllm.batch(plain, [Row(1, CUP), Row(1, DOG), Row(1, CUP)]).inputs
    images = mllm.batch(plain, [Row(1, CUP)]).inputs
    fewer = {key: images.get(key, value) if key in IMAGES else value for key, value in three.items()}
    more = {key: torch.cat([value, value]) if key in IMAGES else value for key, value in three.items()}
    model = attach(copy.deepcopy(plain), TEXTS, tokenizer=mllm.tokenizer, layers=[0])
    options = {} if text is None else {"context_text": text}
    with torch.no_grad():
        for called, reference in [(model, plain), (model.base_model, plain.base_model)]:
            for wrong in (fewer, more):
                with pytest.raises((ValueError, RuntimeError), match="Image features and image tokens") as expected:
                    reference(**wrong)
                with pytest.raises(expected.type, match="Image features and image tokens do not match"):
                    called(**wrong, **options)
                # The refused call leaves nothing behind.
                torch.testing.assert_close(called(**three, **options)[0], reference(**three)[0], rtol=1e-4, atol=1e-5)


@every_model
def test_outputs__tuples_equal_dicts_and_all_optional_ones_come(name):
    model, batch = made(name)
    with torch.no_grad():
        output = model(**batch.inputs, output_hidden_states=True)
        values = model(**batch.inputs, output_hidden_states=True, return_dict=False)
        assert torch.equal(output.logits, values[0])
        assert len(output.hidden_states) == model.config.get_text_config().num_hidden_layers + 1
        model.set_attn_implementation("eager")
        found = model(**batch.inputs, output_attentions=True)
    assert len(found.attentions) == model.config.get_text_config().num_hidden_layers
    kept = batch.inputs["attention_mask"].bool()  # the attention of padding differs
    torch.testing.assert_close(found.logits[kept], output.logits[kept], rtol=1e-4, atol=1e-4)


@every_model
def test_calls_are_deterministic_and_labels_change_no_logits(name):
    model, batch = made(name)
    first = logits(model, batch.inputs)
    assert torch.equal(logits(model, batch.inputs), first)
    ids = batch.inputs["input_ids"]
    with torch.no_grad():
        learned = model(**batch.inputs, labels=torch.full_like(ids, -100).index_fill(1, torch.tensor([-1]), 5))
    assert torch.equal(learned.logits, first)
    assert learned.loss.isfinite()


@every_model
def test_rows_do_not_depend_on_one_another(name):
    """A batch gives each row what it gets alone, whatever the padding."""
    model, batch = made(name)
    mllm = BY_NAME[name]
    both = logits(model, batch.inputs)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    placeholder = mllm.tokenizer.convert_tokens_to_ids("<image>")
    patches = batch.inputs["pixel_values"]
    grid = batch.inputs.get("image_grid_thw")
    cut = [1, 1] if grid is None else grid.prod(-1).tolist()
    for row, pixels in enumerate(patches.split(cut)):
        alone = {"input_ids": ids[row][mask[row]][None], "pixel_values": pixels}
        if grid is not None:
            alone["image_grid_thw"] = grid[row : row + 1]
            alone["mm_token_type_ids"] = (alone["input_ids"] == placeholder).int()
        torch.testing.assert_close(logits(model, alone)[0], both[row][mask[row]], rtol=1e-3, atol=1e-4)


@every_model
def test_saving_and_loading__gives_equal_outputs(name, tmp_path):
    model, batch = made(name)
    before = logits(model, batch.inputs)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    attach(again, TEXTS, tokenizer=BY_NAME[name].tokenizer, pretrained=tmp_path / "covft")
    torch.testing.assert_close(logits(again, batch.inputs), before, rtol=1e-4, atol=1e-5)


@every_model
def test_generation__dict_outputs_scores_and_the_cache(name):
    model, batch = made(name)
    tokens = model.generate(**batch.inputs, **GREEDY)
    assert tokens.shape[1] == batch.inputs["input_ids"].shape[1] + 3
    found = model.generate(
        **batch.inputs, **GREEDY, return_dict_in_generate=True, output_scores=True, output_logits=True,
        output_hidden_states=True,
    )  # fmt: skip
    assert torch.equal(found.sequences, tokens)
    assert len(found.scores) == len(found.logits) == len(found.hidden_states) == 3
    assert torch.equal(model.generate(**batch.inputs, **GREEDY, use_cache=False), tokens)
    assert torch.equal(model.generate(**batch.inputs, **GREEDY, cache_implementation="static"), tokens)
    beams = model.generate(**batch.inputs, **GREEDY, num_beams=2, num_return_sequences=2)
    assert beams.shape == (4, tokens.shape[1])


def test_generation__continues_from_its_cache():
    model, batch = made("llava", [Row(1, CUP)])
    long = model.generate(**batch.inputs, **{**GREEDY, "max_new_tokens": 4, "min_new_tokens": 4})
    first = model.generate(**batch.inputs, **GREEDY, return_dict_in_generate=True)
    mask = torch.ones_like(first.sequences)
    more = model.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=1, min_new_tokens=1,
        do_sample=False,
    )  # fmt: skip
    assert torch.equal(more, long)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_embeddings_instead_of_ids(name):
    model, batch = made(name)
    inputs = {key: value for key, value in batch.inputs.items() if key != "input_ids"}
    embeds = model.get_input_embeddings()(batch.inputs["input_ids"]).detach()
    found = logits(model, {**inputs, "inputs_embeds": embeds}, context_text=[CUP, DOG])
    torch.testing.assert_close(found, logits(model, batch.inputs), rtol=1e-4, atol=1e-5)


@every_model
def test_resized_embeddings_and_tied_weights(name):
    model, batch = made(name)
    before = logits(model, batch.inputs)
    size = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(size + 3)
    torch.testing.assert_close(logits(model, batch.inputs)[..., :size], before, rtol=1e-4, atol=1e-5)
    assert get_encoder(model).vit is not None


@every_model
def test_training__with_gradient_checkpointing_equals_without(name):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, batch = made(name)
        perturb(get_encoder(model))
        model.train()
        if checkpointing:
            recompute(model)
        model(**batch.inputs, labels=batch.inputs["input_ids"]).loss.backward()
        found.append({key: p.grad for key, p in get_encoder(model).named_parameters() if p.grad is not None})
    without, recomputed = found
    assert without.keys() == recomputed.keys() != set()
    for key, gradient in without.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_generation__compiled_with_a_static_cache_and_all_outputs():
    from transformers import CompileConfig

    model, batch = made("llava")
    model.set_attn_implementation("eager")
    wanted = model.generate(**batch.inputs, **GREEDY)
    compiled = CompileConfig(backend="eager", mode="default")
    compiled._compile_all_devices = True  # on the CPU, too
    model.generation_config.compile_config = compiled
    model.generation_config.cache_implementation = "static"
    outputs = {f"output_{name}": True for name in ("attentions", "hidden_states", "scores", "logits")}
    found = model.generate(**batch.inputs, **GREEDY, **outputs, return_dict_in_generate=True)
    assert "_compiled_call" in vars(model)
    assert torch.equal(found.sequences, wanted)
    assert {len(found[name]) for name in ("attentions", "hidden_states", "scores", "logits")} == {3}
