# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Measure what a training step costs: steps per second, where time goes, memory, and arithmetic against the machine's.

A real training by anomalib's Engine is watched from step to step: first timed, then profiled. The floating-point
operations of a step, counted in another training, are set against a large matrix product in the same precision on the
same machine.

Example:
    ``python benchmarks/step.py --data configs/data/mvtec_ad.yaml --set "{training_mode: patchwise, lambda_syn: 0.0}"``
"""

import argparse
import resource
import tempfile
import time
from typing import Any

import pandas as pd
import torch
import yaml
from anomalib.engine import Engine
from anomalib.models import Pedenet
from common import add_data_options, make_datamodule, matrix_throughput, quartiles
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

WARM_UP, PROFILED = 20, 10


class Watch(Callback):
    """Times the steps of a training after some to warm up, and profiles those after them."""

    def __init__(self, num_timed: int) -> None:
        self.last = 0.0
        self.seconds: list[float] = []
        self.timed = range(WARM_UP, WARM_UP + num_timed)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.profiler = profile(activities=activities, acc_events=True)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the time since the same moment of the step before, and start and stop what comes next."""
        del optimizer
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now, step = time.perf_counter(), trainer.global_step
        if step - 1 in self.timed:
            self.seconds.append(now - self.last)
        if step == self.timed.stop:
            self.profiler.start()
        elif step == self.timed.stop + PROFILED:
            self.profiler.stop()
        self.last = time.perf_counter()


class OperationCounter(Callback):
    """Counts the floating-point operations of a training's second step."""

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Count from the same moment of the step before."""
        del pl_module, optimizer
        if trainer.global_step == 0:
            self.counter.__enter__()
        elif trainer.global_step == 1:
            self.counter.__exit__(None, None, None)


def train(options: argparse.Namespace, watch: Callback, num_steps: int, **more: Any) -> tuple[Pedenet, Engine]:  # noqa: ANN401
    """Make some steps of a training, watched by a callback."""
    seed_everything(0)
    model = Pedenet(**options.set | {"max_steps": num_steps, "bank_size": 100, "visualizer": False} | more)
    with tempfile.TemporaryDirectory() as results:
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "limit_val_batches": 0}
        engine = Engine(default_root_dir=results, callbacks=[watch], accelerator=options.accelerator, **quiet)
        engine.fit(model, datamodule=make_datamodule(options))
    return model, engine


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the trainings and return the figures."""
    watch, counting = Watch(options.steps), OperationCounter()
    model, engine = train(options, watch, watch.timed.stop + PROFILED + 1)
    device = engine.trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train(options, counting, 2, cuda_graph=False)  # the operations in a graph cannot be seen
    is_half = model._pace is not None and model._pace.precision == "bfloat16"  # noqa: SLF001 - what "auto" chose
    dtype = torch.bfloat16 if is_half else torch.float32
    times = quartiles(pd.Series(watch.seconds))
    operations, per_second = counting.counter.get_total_flops(), 1e3 / times["ms"]
    peak = matrix_throughput(dtype, device)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(watch.profiler.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40))
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "precision": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "ms per step, median": round(times["ms"], 1),
        "ms per step, quartiles": f"{times['ms_low']:.1f} to {times['ms_high']:.1f}",
        "steps per second": round(per_second, 2),
        "GFLOP per step": round(operations / 1e9, 1),
        "TFLOP/s of the step": round(operations * per_second / 1e12, 3),
        "TFLOP/s of a matrix product": round(peak / 1e12, 3),
        "fraction": round(operations * per_second / peak, 3),
        f"peak memory {'on the GPU' if on_gpu else 'of the process'}, GiB": round(memory / 2**30, 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    add_data_options(parser, required=True)
    parser.add_argument("--set", type=yaml.safe_load, default={}, help="arguments of Pedenet, YAML")
    parser.add_argument("--steps", type=int, default=60, help="steps to time (default: %(default)s)")
    parser.add_argument("--accelerator", default="auto", help="as of the trainer: cpu, gpu, auto")
    for name, value in measure(parser.parse_args()).items():
        print(f"{name:<34}{value}")


if __name__ == "__main__":
    main()
