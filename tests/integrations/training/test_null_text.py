"""The null text in MLLMTrainer: what is replaced, and rows whose user says nothing."""

from __future__ import annotations

import json

import pytest
import torch

from covft.data import ConversationDataset
from covft.errors import ConfigError
from covft.integrations import CoVFTCallback, MLLMTrainer, get_encoder
from tests.helpers.training import TEXTS, arguments, build, dataset, losses, write_folder

pytestmark = pytest.mark.usefixtures("quiet")
SILENT = (0, 4, 5, 9)


@pytest.fixture(scope="module")
def silent_rows(tmp_path_factory):
    """Rows of which some have an image and no question."""
    folder = write_folder(tmp_path_factory.mktemp("llava"))
    records = json.loads((folder / "train.json").read_text())
    for row in SILENT:
        records[row]["conversations"][0]["value"] = "<image>"
    (folder / "train.json").write_text(json.dumps(records))
    rows = dataset(folder)

    def make(**settings):
        return ConversationDataset(
            rows.source, rows.tokenizer, rows.image_processor, image_text=rows.image_text, **settings
        )

    return make


LONG = pytest.mark.long


@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=LONG), 0.5])
@pytest.mark.parametrize("way", ["attach", pytest.param("callback", marks=LONG)])
def test_a_share_of_the_texts_and_all_silent_rows_are_replaced(silent_rows, tmp_path, way, rate):
    settings = {"null_text": True, "null_text_rate": rate}
    rows = silent_rows(null_text=True)
    model = build(attached=way == "attach", **(settings if way == "attach" else {}))
    callbacks = [] if way == "attach" else [CoVFTCallback(TEXTS, tokenizer=rows.tokenizer, **settings)]
    args = arguments(tmp_path, max_steps=12, weight_decay=0.0)
    trainer = MLLMTrainer(model, args, train_dataset=rows, callbacks=callbacks)
    null_text, seen = get_encoder(model).vit.covft_null_text, []
    null_text.register_forward_hook(
        lambda module, given, found: seen.append(((found == module.vector).all(1), given[0], given[2]))
    )
    before = null_text.vector.detach().clone()
    trainer.train()
    assert all(torch.tensor(losses(trainer)).isfinite())
    assert (null_text.vector != before).float().mean() > 0.9
    blocks = len(get_encoder(model).layers)
    replaced, silent = [], []
    for dropped, text, without in seen[::blocks]:
        without = torch.zeros(len(text), dtype=torch.bool) if without is None else without
        replaced.append(dropped)
        silent.append(without)
    replaced, silent = torch.cat(replaced), torch.cat(silent)
    assert silent.any()
    assert not silent.all()
    assert replaced[silent].all()
    share = replaced[~silent].float().mean()
    assert share == 0 if rate == 0 else 0 < share < 1


def test_silent_rows_are_broken_without_it_and_towers_without_it_are_refused(silent_rows, tmp_path):
    assert [row.row for row in silent_rows(max_broken=12).check()] == list(SILENT)
    rows = silent_rows(null_text=True)
    assert rows.check() == []
    assert [rows[row]["context_text"] is None for row in range(12)] == [row in SILENT for row in range(12)]
    with pytest.raises(ConfigError, match="nothing to put there"):
        MLLMTrainer(build(), arguments(tmp_path), train_dataset=rows)
    MLLMTrainer(build(attached=False), arguments(tmp_path), train_dataset=rows)  # which reads no texts
