"""`transformers.pipeline` answers with what `load_model` returns, and the tower reads its question."""

import pytest
import torch

import covft
from tests.helpers.attached import TEXTS
from tests.helpers.towers import perturb
from tests.helpers.watching import watch
from tests.tiny.folders import QUESTION, build, picture

pytestmark = pytest.mark.usefixtures("quiet")
OTHER = "Is there a dog, and where?"
SHORT = {"max_new_tokens": 5, "do_sample": False}


def asking(question):
    parts = [{"type": "image", "image": picture("red")}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


@pytest.fixture(params=["llava", "qwen2_5_vl", "internvl"])
def loaded(request, tmp_path):
    """Model and processor of a folder that was saved after attach."""
    model, processor = build(request.param)
    covft.attach(model, TEXTS, tokenizer=processor)
    perturb(covft.get_encoder(model))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return covft.load_model(tmp_path)


def prompt(processor, question):
    return processor.apply_chat_template(
        asking(question), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def both(loaded, question):
    """Answer and run of the tower: of the pipeline, and of `generate` that is told the question."""
    from transformers import pipeline

    model, processor = loaded
    tower = covft.get_encoder(model).vit
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    [answer], [run] = watch(
        tower, lambda: pipe(text=asking(question), return_full_text=False, generate_kwargs=SHORT)
    )  # fmt: skip
    inputs = prompt(processor, question)
    ids, [told] = watch(tower, lambda: model.generate(**inputs, **SHORT, context_text=question))
    said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer["generated_text"], run, said, told


def test_its_answer_is_that_of_generate__and_the_tower_reads_the_question(loaded):
    runs = []
    for question in (QUESTION, OTHER):
        answer, run, said, told = both(loaded, question)
        assert answer == said
        for ours, theirs in zip(run.features, told.features, strict=True):
            assert torch.equal(ours, theirs)
        runs.append(run)
    assert runs[0].same_images(runs[1])
    assert not torch.allclose(runs[0].features[0], runs[1].features[0], rtol=1e-3)
