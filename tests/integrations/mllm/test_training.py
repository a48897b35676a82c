"""Training attached models: checkpointing, Trainer, accelerate, peft."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from covft.errors import (
    UnsupportedViTError,
)
from covft.integrations import attach, detach, get_encoder
from tests.helpers.attached import CUP, DOG, MIXED, PEOPLE, TEXTS, alone, attached, changed, forward
from tests.helpers.mllms import BY_NAME, Row
from tests.helpers.recomputing import recompute, training_fields
from tests.helpers.towers import perturb

pytestmark = pytest.mark.usefixtures("quiet")
PACKED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "pixtral", "mistral3"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3", "mllama", *PACKED])
def test_gradient_checkpointing__of_the_whole_model_is_exact(name):
    model, batch = attached(name)
    model.double().train()
    inputs = {**batch.inputs, "pixel_values": batch.inputs["pixel_values"].double()}
    labels = inputs["input_ids"].clone()
    labels[:, : labels.shape[1] // 2] = -100
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}

    def gradients():
        model.zero_grad()
        first = model(**inputs, labels=labels).loss
        second = model(**other, context_text=["one", "two", "three"], labels=labels).loss
        (first + 2 * second).backward()  # recomputes the first after the second was run
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert any(".experts." in n and plain[n].abs().max() > 0 for n in plain)
    assert any(".router." in n and plain[n].abs().max() > 0 for n in plain)
    recompute(model)
    again = gradients()
    assert again.keys() == plain.keys()
    assert all(torch.allclose(again[n], plain[n], rtol=1e-9, atol=1e-12) for n in plain)


@pytest.mark.parametrize("column", [False, True], ids=["read", "given"])
def test_trainer__trains_and_evaluates(column, tmp_path):
    from transformers import Trainer, TrainingArguments

    mllm = BY_NAME["llava"]
    plain = mllm.build()
    model = attach(copy.deepcopy(plain), TEXTS, tokenizer=None if column else mllm.tokenizer)
    perturb(get_encoder(model))
    batch = mllm.batch(plain, [Row(1, CUP), Row(1, PEOPLE), Row(1, DOG), Row(1, CUP)])
    samples = [
        {
            "input_ids": batch.inputs["input_ids"][i],
            "attention_mask": batch.inputs["attention_mask"][i],
            "pixel_values": batch.inputs["pixel_values"][i : i + 1],
            "labels": batch.inputs["input_ids"][i].clone(),
            "context_text": MIXED[0].question,
            "not_for_the_model": 1,
        }
        for i in range(4)
    ]
    seen: list[set[str]] = []

    def collate(rows):
        seen.append({name for row in rows for name in row})
        stacked = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask", "labels")}
        given = {"context_text": [row["context_text"] for row in rows]} if column else {}
        return {**stacked, **given, "pixel_values": torch.cat([row["pixel_values"] for row in rows])}

    args = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        **training_fields(),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model, args, train_dataset=samples, eval_dataset=samples, data_collator=collate)
    assert trainer.train().training_loss > 0
    assert seen[0] == {"input_ids", "attention_mask", "pixel_values", "labels", "context_text"}
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in get_encoder(model).named_parameters() if p.requires_grad}
    tower = {f"model.vision_tower.{name.removeprefix('vit.')}" for name in trained}
    assert tower <= moved
    assert not {name for name in moved if name.startswith("model.vision_tower.")} - tower
    assert trainer.evaluate()["eval_loss"] > 0


def test_accelerate__mixed_precision_wraps_and_unwraps(request):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model, batch = attached("llava")
    wanted, _ = forward(model, batch)
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests, and for them
    request.addfinalizer(lambda: AcceleratorState._reset_state(reset_partial_state=True))
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model)
    logits, runs = forward(prepared, batch)
    assert logits.dtype == torch.float32
    assert len(runs) == 1
    assert "context_text" in inspect.signature(prepared.forward).parameters
    with pytest.raises(UnsupportedViTError, match="Another library has replaced model"):
        detach(model)
    back = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(forward(back, batch)[0], wanted)
    detach(back)


def test_peft__attached_before_or_inside():
    peft = pytest.importorskip("peft")

    mllm = BY_NAME["llava"]
    model = mllm.build()
    batch = mllm.batch(model, MIXED)
    config = peft.LoraConfig(target_modules=r".*language_model.*\.q_proj")
    wrapped = peft.get_peft_model(model, config)
    assert attach(wrapped, TEXTS, tokenizer=mllm.tokenizer) is wrapped
    perturb(get_encoder(wrapped))
    _, runs = forward(wrapped, batch)
    assert not any(changed(runs[0].features, alone(wrapped, runs[0].images, [CUP, PEOPLE, PEOPLE])))
    assert wrapped.generate(**batch.inputs, max_new_tokens=2, do_sample=False).shape[0] == 3
    assert any(p.requires_grad for n, p in wrapped.named_parameters() if ".experts." in n)
    detach(wrapped)
