"""The training loop: what is kept, and when it is written."""

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import random_pairs
from safetensors.torch import load_file

from transencoder import training
from transencoder.batches import PairInputs
from transencoder.config.parsing import parse_stage
from transencoder.encoders import CrossEncoder, load_cross_encoder
from transencoder.losses import soft_bce
from transencoder.training import Trainer


class Training:
    """Two epochs of step 2 in batches of 4, sorted by length, 32 steps in all."""

    def __init__(self, tiny_bert, output, graphs, monkeypatch, *words):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision="no")
        stage = ["--model_name_or_path", "m", "--scores", "s", "--output_dir", str(output)]
        options = ["--total_batch_size", "4", "--num_epochs", "2", "--learning_rate", "1e-3", "--eval_steps", "8"]
        arguments = parse_stage("distill_bi2cross", argv=[*stage, *options, "--checkpointing_steps", "8", *words])
        torch.manual_seed(1)
        encoder = load_cross_encoder(str(tiny_bert), dropout=arguments.dropout)
        rows = [{**row, "score": row["score"] / 5} for row in random_pairs(64)]
        rows = PairInputs(datasets.Dataset.from_list(rows), encoder, 64, swap=False)
        monkeypatch.setattr(training, "cuda_graphs", lambda *_: graphs)
        self.shapes, self.losses, self.stop_after = [], [], None
        self.trainer = Trainer(accelerator, encoder, rows, self.loss_of, arguments, None)
        self.output = output

    def loss_of(self, model, batch):
        if len(self.losses) == self.stop_after:
            raise KeyboardInterrupt
        self.shapes.append(tuple(batch["inputs"]["input_ids"].shape))
        loss = soft_bce(model(**batch["inputs"]), batch["scores"])
        self.losses.append(loss.item())
        return loss

    def run(self):
        """Weights, and the mean losses that are evaluated."""
        history = self.trainer.run()["history"]
        return load_file(self.output / "model.safetensors"), [entry["loss"] for entry in history]
