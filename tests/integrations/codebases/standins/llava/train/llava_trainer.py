import pathlib

import torch
from transformers import Trainer


class LLaVATrainer(Trainer):
    def create_optimizer(self, model=None):
        """Learning rates by what is in the names of parameters, as LLaVA-NeXT has them."""
        if self.optimizer is None:
            rates = {"mm_projector": self.args.mm_projector_lr, "vision_tower": self.args.mm_vision_tower_lr}
            rates = {keyword: rate for keyword, rate in rates.items() if rate is not None}
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            groups = [{"params": [p for name, p in named if not any(k in name for k in rates)]}]
            groups += [{"params": [p for n, p in named if k in n], "lr": rate} for k, rate in rates.items()]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]], lr=self.args.learning_rate
            )
        return self.optimizer

    def _save_checkpoint(self, model, trial, metrics=None):
        if not getattr(self.args, "tune_mm_mlp_adapter", False):
            super()._save_checkpoint(model, trial)
            return
        folder = pathlib.Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        self.model.config.save_pretrained(folder)
        _save_projector(self.model, folder)

    def _save(self, output_dir=None, state_dict=None):
        if not getattr(self.args, "tune_mm_mlp_adapter", False):
            super()._save(output_dir, state_dict)


def _save_projector(model, folder):
    weights = {name: p.detach() for name, p in model.named_parameters() if "mm_projector" in name}
    torch.save(weights, pathlib.Path(folder, "mm_projector.bin"))


def safe_save_model_for_hf_trainer(trainer, output_dir):
    if getattr(trainer.args, "tune_mm_mlp_adapter", False):
        _save_projector(trainer.model, output_dir)
        return
    state = {key: value.cpu() for key, value in trainer.model.state_dict().items()}
    trainer._save(output_dir, state_dict=state)
