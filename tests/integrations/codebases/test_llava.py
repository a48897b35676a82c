"""LLaVA and LLaVA-NeXT: the launcher runs their training and evaluation, which stand-ins play."""

import copy
import math
import shutil

import pytest
import torch

import covft
from covft.errors import (
    CheckpointError,
    ConfigError,
    MissingContextError,
    MissingGradientError,
    ReentrantCheckpointError,
    ShapeError,
    UnsupportedViTError,
)
from covft.integrations.codebases import llava as launcher
from covft.integrations.codebases.installing import NO_IMAGE
from covft.testing import HashTextEncoder
from tests.integrations.codebases.folders import (
    SIZE,
    STANDINS,
    forget,
    rows,
    save_clip,
    save_llm,
    tokenizer_for,
    write_json,
)

transformers = pytest.importorskip("transformers")

CHECKPOINTING = "activation_checkpointing"
if not hasattr(transformers.TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"
CLIP_WARNING = "ignore:.*:UserWarning"  # of transformers, about configs of stand-ins
LAYERS = (1, 2)


@pytest.fixture
def theirs(monkeypatch):
    """Their package on the path, and gone afterwards."""
    monkeypatch.syspath_prepend(str(STANDINS))
    forget("llava")
    yield
    forget("llava")


@pytest.fixture
def home(tmp_path):
    """A language model, a tower and data."""
    save_clip(tmp_path / "clip")
    save_llm(tmp_path / "vicuna", tokenizer_for("v1"))
    questions = ["what is left of the cup?", "~who are you?", "how many people are there?", "~and where?"]
    write_json(tmp_path / "data.json", rows(*questions))
    return tmp_path


def build(home, version="v1", kind="LlavaLlamaForCausalLM", tower=None):
    """Their model with its tower loaded, as it is before training."""
    from types import SimpleNamespace

    import llava.conversation
    from llava.model import llava_llama

    tokenizer = tokenizer_for(version)
    save_llm(home / version, tokenizer)
    model = getattr(llava_llama, kind).from_pretrained(home / version)
    arguments = SimpleNamespace(
        vision_tower=str(home / "clip"),
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        tower_kind=tower,
    )
    torch.manual_seed(3)
    model.get_model().initialize_vision_modules(arguments)
    return model.eval(), tokenizer, llava.conversation.conv_templates[version]


def batch_of(tokenizer, conversation, questions, images):
    """Prompts with `images[i]` placeholders in row i, padded on the right."""
    from llava.mm_utils import tokenizer_image_token

    prompts = []
    for question, count in zip(questions, images, strict=True):
        turn = conversation.copy()
        turn.messages = []
        turn.append_message(turn.roles[0], "<image>\n" * count + question)
        turn.append_message(turn.roles[1], None)
        prompts.append(torch.tensor(tokenizer_image_token(turn.get_prompt(), tokenizer)))
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=tokenizer.pad_token_id)
    return {"input_ids": ids, "attention_mask": ids.ne(tokenizer.pad_token_id)}


def attached(home, version="v1", kind="LlavaLlamaForCausalLM", tower=None, **settings):
    model, tokenizer, conversation = build(home, version, kind, tower)
    settings = {"layers": LAYERS, **settings}
    launcher.attach(model, HashTextEncoder(16), tokenizer=tokenizer, conversation=conversation, **settings)
    return model, tokenizer, conversation


def texts_seen(model, monkeypatch):
    """A list of what `encode_text` is asked, and of the text of each row of the tower's batch."""
    encoder = covft.get_encoder(model)
    seen = []
    condition = type(encoder).condition

    def spy(self, text, index=None):
        seen.append([text[i] for i in index.tolist()])
        return condition(self, text, index)

    monkeypatch.setattr(type(encoder), "condition", spy)
    return seen


QUESTIONS = ["what is left of the cup?", "how many people are there?", "where is the dog?"]


@pytest.mark.parametrize("version", ["v0", "v1", "mpt", "qwen_1_5", "llava_llama_2"])
def test_the_question_is_read_from_prompts_of_every_conversation(theirs, home, monkeypatch, version):
    model, tokenizer, conversation = attached(home, version)
    seen = texts_seen(model, monkeypatch)
    batch = batch_of(tokenizer, conversation, QUESTIONS[:2], [1, 1])
    model(**batch, images=torch.randn(2, 3, SIZE, SIZE))
    assert seen == [QUESTIONS[:2]]


def test_nothing_changes_at_the_start(theirs, home):
    model, tokenizer, conversation = build(home)
    batch = batch_of(tokenizer, conversation, QUESTIONS, [1, 0, 2])
    images = torch.randn(4, 3, SIZE, SIZE)
    before = model(**batch, images=images).logits
    launcher.attach(model, HashTextEncoder(16), tokenizer=tokenizer, conversation=conversation, layers=LAYERS)
    torch.testing.assert_close(model(**batch, images=images).logits, before, rtol=1e-4, atol=1e-5)


def stir(encoder):
    """Experts that differ, so that the text shows."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in encoder.vit.named_parameters():
            if ".experts." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)


@pytest.mark.parametrize(("kind", "tower"), [("LlavaLlamaForCausalLM", None), ("LlavaQwenForCausalLM", "next")])
def test_each_image_has_the_question_of_its_row(theirs, home, monkeypatch, kind, tower):
    """Rows with none, one and two images, each of another number of crops: compared with texts given by hand."""
    model, tokenizer, conversation = attached(home, kind=kind, tower=tower)
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


def test_images_as_one_tensor_of_stacks(theirs, home, monkeypatch):
    model, tokenizer, conversation = attached(home)
    seen = texts_seen(model, monkeypatch)
    batch = batch_of(tokenizer, conversation, QUESTIONS[:2], [1, 1])
    model(**batch, images=torch.randn(2, 3, 3, SIZE, SIZE))
    assert seen == [[QUESTIONS[0]] * 3 + [QUESTIONS[1]] * 3]


def test_placeholders_in_the_padding_do_not_count(theirs, home, monkeypatch):
    model, tokenizer, conversation = attached(home)
    batch = batch_of(tokenizer, conversation, QUESTIONS[:2], [1, 1])
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 1), value=-200)
    batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 1))
    seen = texts_seen(model, monkeypatch)
    model(**batch, images=torch.randn(2, 3, SIZE, SIZE))
    assert seen == [QUESTIONS[:2]]


def test_generation_reads_once_and_the_tower_runs_once(theirs, home, monkeypatch):
    model, tokenizer, conversation = attached(home)
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


def test_gradients_reach_everything_and_are_those_of_texts_given_by_hand(theirs, home):
    model, tokenizer, conversation = attached(home)
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


def test_a_batch_of_text_alone_gives_gradients_of_zero(theirs, home):
    """So that every process has the same graph."""
    model, tokenizer, conversation = attached(home)
    model.train()
    batch = batch_of(tokenizer, conversation, QUESTIONS[:2], [0, 0])
    model(**batch, labels=batch["input_ids"], images=torch.zeros(2, 3, SIZE, SIZE)).loss.backward()
    for parameter in covft.get_encoder(model).trainable_parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_rows_without_an_instruction(theirs, home, monkeypatch):
    model, tokenizer, conversation = attached(home)
    batch = batch_of(tokenizer, conversation, [QUESTIONS[0], ""], [1, 1])
    images = torch.randn(2, 3, SIZE, SIZE)
    with pytest.raises(MissingContextError, match="user turns in row 1 of the prompt are empty"):
        model(**batch, images=images)
    model, tokenizer, conversation = attached(home, empty_instruction="describe the image.")
    seen = texts_seen(model, monkeypatch)
    model(**batch, images=images)
    assert seen == [[QUESTIONS[0], "describe the image."]]


def test_answers_are_not_read(theirs, home, monkeypatch):
    from llava.mm_utils import tokenizer_image_token

    model, tokenizer, conversation = attached(home)
    turns = conversation.copy()
    for role, text in zip(turns.roles * 2, ["<image>\nwhat is that?", "a cup", "and this?", "a ball"], strict=True):
        turns.append_message(role, text)
    ids = torch.tensor([tokenizer_image_token(turns.get_prompt(), tokenizer)])
    seen = texts_seen(model, monkeypatch)
    model(input_ids=ids, images=torch.randn(1, 3, SIZE, SIZE))
    assert seen == [["what is that? and this?"]]


def test_what_does_not_add_up(theirs, home):
    model, tokenizer, conversation = attached(home)
    batch = batch_of(tokenizer, conversation, QUESTIONS, [1, 0, 2])
    with pytest.raises(ShapeError, match="do not add up"):
        model(**batch, images=torch.randn(3, 3, SIZE, SIZE))


def test_what_cannot_be_attached(theirs, home):
    model, tokenizer, conversation = build(home, tower="s2")
    arguments = {"tokenizer": tokenizer, "conversation": conversation}
    with pytest.raises(UnsupportedViTError, match="several scales"):
        launcher.attach(model, 16, **arguments)
    model, tokenizer, conversation = build(home)
    with pytest.raises(UnsupportedViTError, match="no model of LLaVA"):
        launcher.attach(model.get_model().get_vision_tower(), 16, **arguments)
    with pytest.raises(ConfigError, match="cannot be read"):
        launcher.attach(model, 16, tokenizer=tokenizer, conversation="plain")
    model.get_model().vision_tower = [model.get_model()._modules.pop("vision_tower")]
    with pytest.raises(UnsupportedViTError, match="hidden"):
        launcher.attach(model, 16, **arguments)
    model, *_ = attached(home)
    with pytest.raises(UnsupportedViTError, match="attached already"):
        launcher.attach(model, 16, **arguments)


def test_a_copy_has_a_tower_of_its_own(theirs, home):
    model, tokenizer, conversation = attached(home)
    twin = copy.deepcopy(model)
    stir(covft.get_encoder(twin))
    batch = batch_of(tokenizer, conversation, QUESTIONS[:2], [1, 1])
    images = torch.randn(2, 3, SIZE, SIZE)
    twin.train()
    twin(**batch, labels=batch["input_ids"], images=images).loss.backward()
    assert all(p.grad is not None for p in covft.get_encoder(twin).trainable_parameters())
    assert all(p.grad is None for p in covft.get_encoder(model).trainable_parameters())
    assert (twin.eval()(**batch, images=images).logits - model(**batch, images=images).logits).abs().max() > 1e-4


# ------------------------------------------------------------------------------------- the launcher


def run(home, *flags, script="llava.train.train_mem", covft_flags=(), steps=2, **replaced):
    arguments = {
        "model_name_or_path": home / "vicuna",
        "version": "v1",
        "vision_tower": home / "clip",
        "mm_vision_select_layer": -2,
        "data_path": home / "data.json",
        "output_dir": home / "out",
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "seed": 7,
        "disable_tqdm": True,
        **replaced,
    }
    theirs = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    ours = ["--covft_text_encoder", "hash:16", "--covft_layers", "1-2", *covft_flags]
    launcher.main([*ours, "--", script, *theirs, *flags])


def evaluate(home, *covft_flags, folder="out"):
    torch.manual_seed(9)
    torch.save(torch.randn(1, 3, SIZE, SIZE), home / "image.pt")
    arguments = ["--model-path", home / folder, "--question", QUESTIONS[0]]
    arguments += ["--image-file", home / "image.pt", "--answers-file", home / "answers.pt"]
    launcher.main([*covft_flags, "--", "llava.eval.model_vqa_loader", *map(str, arguments)])
    return torch.load(home / "answers.pt")


@pytest.fixture
def trainers(monkeypatch):
    """Every Trainer that is made, to look at afterwards."""
    made = []
    train = transformers.Trainer.train

    def spy(self, *args, **kwargs):
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        made.append(self)
        result = train(self, *args, **kwargs)
        self.end = {name: value.clone() for name, value in self.model.state_dict().items()}
        return result

    monkeypatch.setattr(transformers.Trainer, "train", spy)
    return made


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_training_moves_what_should_be_trained(theirs, home, trainers, monkeypatch):
    reported = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        reported.append(dict(logs))

    monkeypatch.setattr(transformers.trainer_callback.PrinterCallback, "on_log", on_log)
    before = transformers.Trainer.__init__
    run(home, f"--{CHECKPOINTING}", "True", "--logging_steps", "1", steps=3)
    (trainer,) = trainers
    assert transformers.Trainer.__init__ is before
    assert getattr(trainer.args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False}
    moved = {name for name in trainer.start if not torch.equal(trainer.start[name], trainer.end[name])}
    encoder = covft.get_encoder(trainer.model)
    prefix = "model.vision_tower.vision_tower."
    trained = {prefix + name for name, p in encoder.vit.named_parameters() if p.requires_grad}
    assert {name for name in moved if name.startswith(prefix)} == trained
    assert {"lm_head.weight", "model.mm_projector.weight"} <= moved
    logged = next(entry for entry in reported if "loss" in entry)
    assert 0 < logged["covft/routing_entropy"] <= math.log(4) + 1e-6
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in encoder.trainable_parameters()} <= in_optimizer


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_the_tower_is_saved_everywhere_and_evaluated(theirs, home, trainers):
    run(home)
    (trainer,) = trainers
    for folder in ("out", "out/checkpoint-1", "out/checkpoint-2"):
        assert (home / folder / "covft" / "covft_config.json").is_file()
    results = evaluate(home)

    # The model in memory says the same as the one that was loaded.
    tokenizer = tokenizer_for("v1")
    import llava.conversation

    batch = batch_of(tokenizer, llava.conversation.conv_templates["v1"], QUESTIONS[:1], [1])
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], images=torch.load(home / "image.pt")).logits
    torch.testing.assert_close(results["logits"], logits, rtol=1e-4, atol=1e-5)
    shutil.rmtree(home / "out" / "covft")
    with pytest.raises(ConfigError, match="was not trained with covft"):
        evaluate(home)


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_llava_next_whose_tower_is_loaded_with_the_model(theirs, home, trainers):
    """Its checkpoint holds the original tower, so that loading finds every weight of it."""
    parts = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
    flags = ["--mm_tunable_parts", parts, "--mm_vision_tower_lr", "2e-3", "--tower_kind", "next"]
    run(home, *flags, "--image_aspect_ratio", "anyres_max_9", version="v1")
    (trainer,) = trainers
    encoder = covft.get_encoder(trainer.model)
    tower = [group for group in trainer.optimizer.param_groups if group["lr"] == 2e-3]
    assert {id(p) for group in tower for p in group["params"]} == {id(p) for p in encoder.trainable_parameters()}
    frozen = [name for name, p in encoder.vit.named_parameters() if not p.requires_grad]
    assert any("self_attn" in name for name in frozen)

    from llava.model.llava_llama import LlavaQwenForCausalLM
    from transformers import CLIPVisionModel

    config = LlavaQwenForCausalLM.config_class.from_pretrained(home / "out")
    config.delay_load = "weights"
    model = LlavaQwenForCausalLM.from_pretrained(home / "out", config=config).eval()
    original = CLIPVisionModel.from_pretrained(home / "clip").state_dict()
    tower = model.get_vision_tower().vision_tower
    for name, value in tower.state_dict().items():
        torch.testing.assert_close(value, original[name])
    tokenizer = tokenizer_for("v1")
    launcher.attach(model, tokenizer=tokenizer, conversation="vicuna_v1", pretrained=home / "out" / "covft")
    import llava.conversation

    batch = batch_of(tokenizer, llava.conversation.conv_templates["v1"], QUESTIONS[:2], [1, 1])
    images = [torch.randn(3, 3, SIZE, SIZE), torch.randn(1, 3, SIZE, SIZE)]
    expected = trainer.model.eval()(**batch, images=images).logits
    torch.testing.assert_close(model(**batch, images=images).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_an_interrupted_run_ends_where_a_whole_one_does(theirs, home, trainers):
    run(home, steps=3, output_dir=home / "whole")
    run(home, steps=1, output_dir=home / "cut")
    run(home, steps=3, output_dir=home / "cut")
    whole, _, resumed = trainers
    assert resumed.state.global_step == 3
    for name, value in whole.end.items():
        torch.testing.assert_close(resumed.end[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_a_checkpoint_without_its_tower_is_refused(theirs, home):
    run(home, steps=1)
    (home / "out" / "checkpoint-1" / "covft" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing or cut short"):
        run(home, steps=2)


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_a_checkpoint_of_other_settings_is_refused(theirs, home):
    run(home, steps=1)
    with pytest.raises(CheckpointError, match="other settings"):
        run(home, steps=2, covft_flags=["--covft_experts", "3"])


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_stage_1_saves_the_tower_beside_the_projector(theirs, home):
    flags = ["--tune_mm_mlp_adapter", "True"]
    with pytest.raises(ConfigError, match="train stage 1"):
        run(home, *flags, version="plain")
    run(home, *flags, version="plain", covft_flags=["--covft_empty_instruction", "describe the image."])
    for folder in ("out", "out/checkpoint-1", "out/checkpoint-2"):
        assert (home / folder / "covft" / "model.safetensors").is_file()
        assert (home / folder / "mm_projector.bin").is_file()


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_lora_of_the_language_model(theirs, home, trainers):
    """A PeftModel saves its adapters alone; the tower is written all the same, and comes back on resume."""
    pytest.importorskip("peft")
    run(home, "--lora_enable", "True", steps=2)
    run(home, "--lora_enable", "True", steps=2)  # resumes, and has nothing left to do
    first, resumed = trainers
    for folder in ("out", "out/checkpoint-1", "out/checkpoint-2"):
        assert (home / folder / "covft" / "covft_config.json").is_file()
        assert (home / folder / "adapter_config.json").is_file()
    assert resumed.state.global_step == 2
    encoder = covft.get_encoder(resumed.model)
    moved = 0
    for name, value in covft.get_encoder(first.model).adapted_state_dict().items():
        torch.testing.assert_close(encoder.adapted_state_dict()[name], value, msg=name)
        prefix = next(key for key in first.start if key.endswith(name))
        moved += not torch.equal(value, first.start[prefix])
    assert moved == len(encoder.adapted_state_dict())
    saved = covft.load(home / "out" / "covft", vit=transformers.CLIPVisionModel.from_pretrained(home / "clip"))
    for name, value in encoder.adapted_state_dict().items():
        torch.testing.assert_close(saved.adapted_state_dict()[name], value)


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_a_second_stage_goes_on_with_a_saved_tower(theirs, home, trainers):
    run(home, steps=1)
    arguments = ["--covft_pretrained", str(home / "out" / "covft")]
    theirs_too = ["--model_name_or_path", str(home / "vicuna")]
    with pytest.raises(ConfigError, match="has its own settings"):
        run(home, output_dir=home / "more", covft_flags=arguments)
    flags = ["--version", "v1", "--vision_tower", home / "clip", "--mm_vision_select_layer", "-2", "--data_path"]
    flags += [home / "data.json", "--output_dir", home / "more", "--max_steps", "1", "--use_cpu", "True"]
    flags += ["--report_to", "none", "--remove_unused_columns", "False", "--disable_tqdm", "True"]
    launcher.main([*arguments, "--", "llava.train.train_mem", *theirs_too, *map(str, flags)])
    first, second = trainers
    for name, value in covft.get_encoder(first.model).adapted_state_dict().items():
        torch.testing.assert_close(second.start[f"model.vision_tower.vision_tower.{name}"], value)


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_blocks_that_nothing_reads_end_the_training_at_once(theirs, home):
    with pytest.raises(MissingGradientError, match="no gradient"):
        run(home, covft_flags=["--covft_layers", "2-3"])


def test_reentrant_checkpointing_is_refused():
    from types import SimpleNamespace

    from covft.integrations.codebases.trainer_hooks import before_trainer

    asked = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ReentrantCheckpointError):
        before_trainer(asked)
    unsaid = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs=None)
    before_trainer(unsaid)
    assert unsaid.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.filterwarnings(CLIP_WARNING)
def test_a_script_by_its_path(theirs, home):
    run(home, script=str(STANDINS / "llava" / "train" / "train_mem.py"), steps=1)
    assert (home / "out" / "covft").is_dir()
