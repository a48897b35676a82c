r"""Answer or embed a large corpus of questions about pictures; any number of processes, resumable.

    accelerate launch --num_processes 8 examples/corpus/run.py --model runs/llava-covft \
        --data questions.jsonl --images pictures --output runs/answers

--model is a folder that covft.load_model loads. --data has a question per line, {"image": ..., "question": ...}, or is
a data set of LLaVA or InternVL, whose first questions are asked. --output gets a Parquet file per shard. Processes
share nothing but that folder: start the same command again, or on more machines, and what is finished stays.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import HfArgumentParser

from covft.data import IMAGE_TAG, DataError, RowSource, open_rows
from covft.data.chat_template import reads_image_parts
from covft.integrations import load_model
from covft.utils.shards import Shards

LOCAL = int(os.environ.get("LOCAL_RANK", 0))  # set by accelerate launch and torchrun


@dataclass
class Arguments:
    """Command-line options."""

    model: str = field(metadata={"help": "Folder of a saved model, or its id on the Hub."})
    data: str = field(metadata={"help": "JSONL of image and question, LLaVA's JSON, or InternVL's meta file."})
    output: str = field(metadata={"help": "Folder for the shards; all processes must see it."})
    images: str | None = field(default=None, metadata={"help": "Root folder of the images; a meta file names its own."})
    task: str = field(default="answer", metadata={"help": "answer, or embed.", "choices": ["answer", "embed"]})
    shard_size: int = field(default=1000, metadata={"help": "Rows per shard: what a process that dies loses."})
    batch: int = field(default=8, metadata={"help": "Rows at once."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    dtype: str = field(default="float32", metadata={"help": "bfloat16 halves the memory."})
    device: str = field(default=f"cuda:{LOCAL}" if torch.cuda.is_available() else "cpu", metadata={"help": "Device."})
    text_encoder: str | None = field(
        default=None, metadata={"help": "Id or folder; needed if it was a folder in training."}
    )


@dataclass
class Asked:
    """A row of the corpus, and what came out."""

    row: int
    id: str = ""
    question: str = ""
    images: list[Any] = field(default_factory=list)
    result: Any = None
    error: str | None = None


def read(rows: RowSource, number: int) -> Asked:
    """Read a row; one that is broken says so, and keeps its place."""
    try:
        row = rows[number]
        message = next(message for message in row.messages if message["role"] == "user")
        names = row.images[: message["content"].count(IMAGE_TAG)]
        question = message["content"].replace(IMAGE_TAG, "").strip()
        return Asked(number, row.id, question, [rows.image(number, name) for name in names])
    except DataError as error:
        return Asked(number, error=str(error))


class Reader:
    """A model and its processor, for batches of rows.

    Args:
        args: The options.
    """

    def __init__(self, args: Arguments) -> None:
        self.args = args
        model, self.processor = load_model(args.model, args.text_encoder, dtype=getattr(torch, args.dtype))
        self.model = model.to(args.device)
        self.processor.tokenizer.padding_side = "left"
        self.by_parts = reads_image_parts(self.processor)

    def inputs(self, asked: list[Asked]) -> Any:
        """Make inputs of some rows, all with images or all without."""
        texts = [self.prompt(one) for one in asked]
        images = [one.images for one in asked] if asked[0].images else None
        inputs = self.processor(
            images=images, text=texts, padding=True, add_special_tokens=False, return_tensors="pt"
        )  # fmt: skip
        return inputs.to(self.args.device, dtype=self.model.dtype)

    def prompt(self, one: Asked) -> str:
        """Write a row as the chat template does, whose contents are lists of parts or text."""
        options = {"tokenize": False, "add_generation_prompt": True}
        if self.by_parts:
            parts = [*[{"type": "image"}] * len(one.images), {"type": "text", "text": one.question}]
            return self.processor.apply_chat_template([{"role": "user", "content": parts}], **options)
        text = "\n".join([*[self.processor.image_token] * len(one.images), one.question])
        template = self.processor.chat_template or self.processor.tokenizer.chat_template
        messages = [{"role": "user", "content": text}]
        return self.processor.tokenizer.apply_chat_template(messages, chat_template=template, **options)

    def answer(self, asked: list[Asked]) -> list[str]:
        """Answer some rows."""
        inputs = self.inputs(asked)
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.args.max_new_tokens)
        answers = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def embed(self, asked: list[Asked]) -> list[list[float] | None]:
        """Embed the pictures of some rows: the mean of what the language model gets of them, for this question."""
        if not asked[0].images:
            return [None] * len(asked)
        inputs = self.inputs(asked)
        first = self.model(**inputs, output_hidden_states=True).hidden_states[0].float()
        shown = (inputs["input_ids"] == self.model.config.image_token_id)[..., None]
        return ((first * shown).sum(1) / shown.sum(1)).tolist()

    @torch.no_grad()
    def work(self, asked: list[Asked]) -> None:
        """Fill in the results of a batch; rows that could not be read stay as they are."""
        run = self.answer if self.args.task == "answer" else self.embed
        for some in (True, False):
            part = [one for one in asked if one.error is None and bool(one.images) is some]
            for one, result in zip(part, run(part) if part else (), strict=True):
                one.result = result


def table_of(asked: list[Asked], task: str) -> pa.Table:
    """Make a table of finished rows."""
    kind = pa.string() if task == "answer" else pa.list_(pa.float32())
    columns = {"row": pa.int64(), "id": pa.string(), "question": pa.string(), task: kind, "error": pa.string()}
    listed = [[getattr(one, "result" if name == task else name) for one in asked] for name in columns]
    return pa.table([pa.array(values, kind) for values, kind in zip(listed, columns.values(), strict=True)], [*columns])


def main() -> None:
    """Work on shards until all are finished."""
    [args] = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    rows = open_rows(args.data, args.images)
    about = {
        "model": args.model, "data": args.data, "bytes": Path(args.data).stat().st_size, "task": args.task,
        "max_new_tokens": args.max_new_tokens, "dtype": args.dtype,
    }  # fmt: skip
    shards = Shards(args.output, len(rows), args.shard_size, about=about)
    print(f"{len(rows)} rows in {len(shards)} shards, {len(shards.missing())} to do", flush=True)
    if not shards.missing():
        return
    reader = Reader(args)
    for shard in shards:
        done: list[Asked] = []
        for start in range(shard.rows.start, shard.rows.stop, args.batch):
            batch = [read(rows, number) for number in shard.rows if start <= number < start + args.batch]
            reader.work(batch)
            done += batch
            shard.beat()
            for one in batch:
                one.images = []  # they can be large
        shard.write(partial(pq.write_table, table_of(done, args.task)))
        broken = sum(one.error is not None for one in done)
        print(f"{shard.path.name}: {len(done)} rows" + (f", {broken} cannot be read" if broken else ""), flush=True)


if __name__ == "__main__":
    main()
