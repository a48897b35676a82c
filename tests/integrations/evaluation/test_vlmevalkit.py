"""The launcher of VLMEvalKit, on a stand-in of its call shape."""

import contextlib
import json

import pytest
import torch
from PIL import Image

import covft
from covft.errors import ConfigError, EvaluationError, MissingDependencyError, UnsupportedVersionError
from covft.integrations.evaluation.scores import read_scores
from covft.integrations.evaluation.told import GENERIC
from covft.integrations.evaluation.vlmevalkit import command, main, parse

pytestmark = pytest.mark.usefixtures("quiet")
QUESTIONS = ("What colour is it?", "How bright is it?", "Is it red?")
LETTER = "Answer with the option's letter from the given choices directly."


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Folder of data sets: MMVP of multiple choice, and one with a picture that is none."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("LMUData", str(folder))
    monkeypatch.delenv("MMEVAL_ROOT", raising=False)
    Image.new("RGB", (40, 32), (200, 30, 30)).save(folder / "red.png")
    (folder / "bad.png").write_text("not a picture")
    rows = [
        {"image_path": str(folder / "red.png"), "question": q, "A": "red", "B": "blue", "answer": "A"}
        for q in QUESTIONS
    ]
    (folder / "MMVP.json").write_text(json.dumps(rows))
    (folder / "Broken.json").write_text(json.dumps([rows[0], {**rows[1], "image_path": str(folder / "bad.png")}]))
    return folder


def expected(saved, data, texts, *, attached=True, told=None):
    """Answers to texts of the user, asked without any engine."""
    import transformers

    if attached:
        model, processor = covft.load_model(saved)
    else:
        model = transformers.AutoModelForImageTextToText.from_pretrained(saved).eval()
        processor = transformers.AutoProcessor.from_pretrained(saved)
    found = []
    for text in texts:
        prompt = f"USER: <image>\n{text} ASSISTANT:"
        inputs = processor(images=[Image.open(data / "red.png")], text=prompt, return_tensors="pt")
        kwargs = {} if told is None else {"context_text": told}
        with torch.no_grad():
            ids = model.generate(**inputs, **kwargs, max_new_tokens=5, do_sample=False)
        found.append(
            processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        )
    return found


def of_dataset(question):
    select = "Please select the correct answer from the options above. \n"
    return f"Question: {question}\nOptions:\nA. red\nB. blue\n{select}"


def answers(output, name, dataset="MMVP"):
    (path,) = output.glob(f"{name}/*/{name}_{dataset}.json")
    return [row["prediction"] for row in json.loads(path.read_text())]


@contextlib.contextmanager
def blocks_that_run():
    """Count the blocks of towers that compute."""
    counted = []
    watched = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: counted.append(1) if type(module).__name__ == "CLIPAttention" else None
    )
    try:
        yield counted
    finally:
        watched.remove()


@pytest.mark.filterwarnings("ignore:The tower reads what the engine adds")
def test_answers_are_those_of_the_attached_model(saved, data, run_py, tmp_path):
    texts = [of_dataset(question) for question in QUESTIONS]
    output = tmp_path / "out"
    asked = ["--data", "MMVP", "--work-dir", str(output)]
    with blocks_that_run() as ran:
        main([str(saved), "--run", str(run_py), "--max_new_tokens", "5", "--", *asked])
    assert len(ran) == 1 + 3 * 2, "three questions about one picture; the first of three blocks is the trunk"
    given = answers(output, "covft")
    assert given == expected(saved, data, texts)
    assert given != expected(saved, data, texts, attached=False)
    (status,) = output.glob("covft/*/status.json")
    assert json.loads(status.read_text())["datasets"]["MMVP"]["judge_model"] == "exact_matching"
    assert read_scores(output, ["MMVP"]).values == {"MMVP": 0.0}
    from vlmeval import STARTED

    assert STARTED == ["load_env"]


def test_a_config__another_text_for_the_tower_and_llava_s_prompt(saved, data, run_py, tmp_path):
    options = {"class": "CoVFT", "folder": str(saved), "text": "generic", "prompt": "llava", "max_new_tokens": 5}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": {"told": options}, "data": {"MMVP": {}}}))
    main(["--run", str(run_py), "--", "--config", str(config), "--work-dir", str(tmp_path / "out"), "--judge=gpt"])
    texts = [f"{question}\nA. red\nB. blue\n{LETTER}" for question in QUESTIONS]
    assert answers(tmp_path / "out", "told") == expected(saved, data, texts, told=GENERIC)
    (status,) = (tmp_path / "out").glob("told/*/status.json")
    assert json.loads(status.read_text())["datasets"]["MMVP"]["judge_model"] == "gpt"


@pytest.mark.filterwarnings("ignore:The tower reads what the engine adds")
def test_a_failing_row_ends_the_run(saved, data, run_py, tmp_path, capsys):
    with pytest.raises(SystemExit, match="covft: a row of Broken failed"):
        main([str(saved), "--run", str(run_py), "--", "--data", "Broken", "--work-dir", str(tmp_path / "out")])
    assert "bad.png" in capsys.readouterr().err


def test_a_data_set_without_results_is_an_error(saved, data, run_py, tmp_path):
    output = str(tmp_path / "out")
    with pytest.raises(EvaluationError, match="Nowhere: invalid_dataset"):
        main([str(saved), "--run", str(run_py), "--", "--data", "Nowhere", "--work-dir", output])


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([], ["--data", "MMVP"], "no model to evaluate"),
        (["--text", "blank"], ["--config", "c.json"], "stand in --config"),
        (["folder"], ["--model", "echo", "other"], "not clear which model"),
        (["folder", "--text", "wrong"], [], "text='wrong' is not known"),
        (["folder", "--prompt", "mine"], [], "prompt='mine' is not known"),
        (["folder", "--max_new_tokens", "0"], [], "that short"),
    ],
)
def test_command_lines_that_cannot_work(run_py, ours, theirs, expected):
    with pytest.raises(ConfigError, match=expected):
        parse([*ours, "--run", str(run_py), "--", *theirs])


def test_what_is_not_vlmevalkit(saved, run_py, tmp_path):
    with pytest.raises(ConfigError, match="is not a file"):
        parse([str(saved), "--run", str(tmp_path / "run.py")])
    other = tmp_path / "run.py"
    other.write_text("import vlmeval_nowhere")
    with pytest.raises(MissingDependencyError, match="vlmeval_nowhere"):
        main([str(saved), "--run", str(other), "--", "--data", "MMVP"])
    other.write_text("")
    with pytest.raises(UnsupportedVersionError, match="main"):
        main([str(saved), "--run", str(other), "--", "--data", "MMVP"])
    with pytest.raises(ConfigError, match="a model echo of its own"):
        main([str(saved), "--run", str(run_py), "--", "--data", "MMVP", "--model", "echo"])


def test_the_command_of_a_folder(run_py):
    words = command("runs/a", run_py, "paper", "out", {"text": "swapped", "dtype": None})
    assert words[1:] == [
        *("-m", "covft.integrations.evaluation.vlmevalkit", "runs/a", "--run", str(run_py), "--text", "swapped", "--"),
        *("--data", "MME", "MMBench_DEV_EN", "MMBench_DEV_CN", "GQA_TestDev_Balanced", "ScienceQA_TEST", "AI2D_TEST"),
        *("TextVQA_VAL", "MMVP", "RealWorldQA", "CV-Bench-2D", "CV-Bench-3D"),
        *("--model", "covft-swapped", "--work-dir", "out"),
    ]
    extra = ["--prompt", "llava", "--verbose", "--trunk_cache_mb=0"]
    assert command("a", run_py, "MMVP", "out", {"text": "blank"}, extra)[6:] == [
        *("--text", "blank", "--prompt", "llava", "--trunk_cache_mb", "0", "--"),
        *("--data", "MMVP", "--model", "covft-blank", "--work-dir", "out", "--verbose"),
    ]
    parsed = parse(words[3:])
    assert (parsed.name, parsed.options.text, parsed.theirs[-2:]) == (
        "covft-swapped",
        "swapped",
        ("--judge", "exact_matching"),
    )
