"""Stands in for VLMEvalKit's run.py: its arguments, its calls of models and data sets, its files and its errors."""

import argparse
import csv
import json
import traceback
from pathlib import Path

from vlmeval import STARTED
from vlmeval.config import supported_VLM
from vlmeval.dataset import build_dataset


def load_env():
    STARTED.append("load_env")


def build_model(config, name):
    import vlmeval.vlm

    options = dict(config[name])
    if "class" not in options:
        return supported_VLM[name](**options)
    return getattr(vlmeval.vlm, options.pop("class"))(**options)


def infer(model, dataset, name):
    model = supported_VLM[model]() if isinstance(model, str) else model
    model.set_dump_image(dataset.dump_image)
    for line in dataset.data:
        custom = model.use_custom_prompt(name)
        message = model.build_prompt(line, dataset=name) if custom else dataset.build_prompt(line)
        line["prediction"] = model.generate(message=message, dataset=name)
    return model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--model", nargs="+")
    for name, default in {"config": None, "work-dir": "./outputs", "mode": "all", "judge": None}.items():
        parser.add_argument(f"--{name}", default=default)
    args, config = parser.parse_args(), None
    if args.config is not None:
        config = json.loads(Path(args.config).read_text())
        args.model, args.data = list(config["model"]), list(config["data"])
    for model_name in args.model:
        folder, model = Path(args.work_dir) / model_name / "T20260818-101500", model_name
        folder.mkdir(parents=True, exist_ok=True)
        states = {}
        if config is not None:
            model = build_model(config["model"], model_name)
        for name in args.data:
            state = states[name] = {"status": "pending", "judge_model": args.judge}
            try:
                dataset = build_dataset(name)
                if dataset is None:
                    state |= {"status": "done", "skip_reason": "invalid_dataset"}
                    continue
                model = infer(model, dataset, name)
                (folder / f"{model_name}_{name}.json").write_text(json.dumps(dataset.data))
                state["status"] = "infer"
                if args.mode != "infer":
                    right = dataset.evaluate()
                    with (folder / f"{model_name}_{name}_acc.csv").open("w", newline="") as file:
                        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["split", "Overall"], ["none", right]])
                    state |= {"status": "done", "metrics": {"split=none|Overall": right}}
            except Exception as error:
                traceback.print_exception(error)
                state |= {"status": "done", "error_message": str(error)}
            finally:
                (folder / "status.json").write_text(json.dumps({"model_name": model_name, "datasets": states}))


if __name__ == "__main__":
    load_env()
    main()
