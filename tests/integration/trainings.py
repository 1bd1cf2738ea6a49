# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Trainings in processes of their own, which tests kill, compare and run side by side."""

import json
import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

SMALL: dict[str, Any] = {
    "image_size": (112, 128),
    "patch_sizes": [32],
    "stride": 16,
    "bank_stride": 16,
    "bank_size": 50,
    "crops_per_step": 1,
    "crop_size": 64,
    "patches_per_step": 64,
    "pairs_per_step": 64,
    "steps_per_image": 1,
    "train_precision": "float32",
}

# The server imports the libraries once, and each process is a fork of it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.integration.trainings", "anomalib.engine", "anomalib.data", "anomalib_pedenet"])


def start(target: Any, *arguments: Any, **options: Any) -> BaseProcess:  # noqa: ANN401
    """Start a function of a module in a process of its own."""
    process = _CONTEXT.Process(target=target, args=arguments, kwargs=options)
    process.start()
    return process


class Watch(Callback):
    """Notes what a process has in a training, and breaks it.

    Args:
        root: Folder of the notes, ``rank<n>.pt``.
        draw_as: Process as which a single one is to draw.
        break_rank: Process that is to fail, if any.
        break_how: ``"raise"`` or ``"kill"``.
    """

    def __init__(self, root: Path, draw_as: int | None = None, break_rank: int = -1, break_how: str = "raise") -> None:
        self.root = root
        self.draw_as = draw_as
        self.break_rank = break_rank
        self.break_how = break_how
        self.notes: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del trainer, pl_module
        if self.draw_as is not None:
            torch.manual_seed(torch.initial_seed() + self.draw_as)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        del optimizer
        if trainer.global_step == 0:
            self.notes["weights"] = [parameter.detach().clone() for parameter in pl_module.parameters()]
            self.notes["gradients"] = [
                parameter.grad.clone() for parameter in pl_module.parameters() if parameter.grad is not None
            ]
        if trainer.global_step == 9 and trainer.global_rank == self.break_rank:
            if self.break_how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            msg = "This process fails."
            raise RuntimeError(msg)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.notes["state"] = {name: value for name, value in pl_module.state_dict().items() if torch.is_tensor(value)}
        self.notes["files"] = pl_module._pool.sources
        torch.save(self.notes, self.root / f"rank{trainer.global_rank}.pt")


def train(root: Path, data: Path, checkpoint: Path | None = None, **options: Any) -> None:  # noqa: ANN401
    """Train and test with a seed, and save the metrics: ``root / "metrics.pt"``.

    Args:
        root: Folder of the results.
        data: Root of the data set.
        checkpoint: Checkpoint to go on from.
        **options: ``model``, ``loader`` (the data module), ``trainer`` and ``watch``: arguments of those; ``seed``; and
            whether to ``test``.
    """
    from anomalib.data import MVTecAD
    from anomalib.engine import Engine
    from lightning.pytorch import seed_everything

    from anomalib_pedenet import Pedenet

    torch.set_num_threads(1)
    # Workers of the data loader that a server had started would outlive a training that is killed.
    multiprocessing.set_start_method("fork", force=True)
    log = os.open(root.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    seed_everything(options.get("seed", 3))
    datamodule = MVTecAD(
        root=data,
        category="stripes",
        **{"train_batch_size": 2, "eval_batch_size": 2, "num_workers": 0} | options.get("loader", {}),
    )
    root.mkdir(parents=True, exist_ok=True)
    engine = Engine(
        default_root_dir=root,
        enable_progress_bar=False,
        accelerator="cpu",
        callbacks=[Watch(root, **options.get("watch", {}))],
        **options.get("trainer", {}),
    )
    model = Pedenet(**SMALL | {"max_steps": 36, "visualizer": False} | options.get("model", {}))
    engine.fit(model, datamodule=datamodule, ckpt_path=checkpoint)
    if not options.get("test", True):
        return
    metrics = engine.test(model, datamodule=datamodule, ckpt_path=engine.best_model_path, verbose=False)
    torch.save(metrics, root / "metrics.pt")


def last_checkpoint(root: Path) -> Path | None:
    """Return the checkpoint that was written last below a folder."""
    paths = [path for path in root.rglob("*.ckpt") if "latest" not in path.parts]
    return max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)


if __name__ == "__main__":  # so that Lightning can start the script again for each of its processes
    arguments = json.loads(sys.argv[1])
    train(Path(arguments.pop("root")), Path(arguments.pop("data_root")), arguments.pop("checkpoint", None), **arguments)
