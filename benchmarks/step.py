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
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from anomalib.engine import Engine
from anomalib.models import Pedenet
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from train import make_datamodule

from anomalib_pedenet.scorers.nearest_neighbor import multiply_by_onednn

WARM_UP, PROFILED = 20, 10


class Watch(Callback):
    """Times and profiles the steps of a training.

    Args:
        num_timed (int): Number of steps to time.
    """

    def __init__(self, num_timed: int) -> None:
        self.last = 0.0
        self.seconds: list[float] = []
        self.timed = range(WARM_UP, WARM_UP + num_timed)
        self.profiler = profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available(), acc_events=True
        )

    @property
    def num_steps(self) -> int:
        """Steps of training that are needed."""
        return self.timed.stop + PROFILED + 1

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


def processor_name() -> str:
    """Return the processor's name, as far as the system says it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def matrix_throughput(dtype: torch.dtype, device: torch.device, side: int = 4096, repeats: int = 10) -> float:
    """Return the floating-point operations per second of a large matrix product: the best of some repeats.

    On a CPU also as a convolution of 1x1: torch multiplies float32 by MKL and convolves by oneDNN, which is twice as
    fast on some processors.
    """
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    products: list[Callable[[], torch.Tensor]] = [lambda: left @ right]
    if device.type == "cpu":
        products.append(lambda: multiply_by_onednn(left, right))
    seconds = []
    for product in products:
        for _ in range(repeats):
            start = time.perf_counter()
            product()[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def train(options: argparse.Namespace, watch: Callback, num_steps: int, **more: Any) -> tuple[Pedenet, Engine]:  # noqa: ANN401
    """Make some steps of a training, watched by a callback."""
    seed_everything(0)
    model = Pedenet(**options.set | {"max_steps": num_steps, "bank_size": 100, "visualizer": False} | more)
    with tempfile.TemporaryDirectory() as results:
        engine = Engine(
            default_root_dir=results,
            callbacks=[watch],
            logger=False,
            enable_progress_bar=False,
            accelerator=options.accelerator,
            limit_val_batches=0,
        )
        engine.fit(model, datamodule=make_datamodule(options))
    return model, engine


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the training and return the figures."""
    watch, counting = Watch(options.steps), OperationCounter()
    model, engine = train(options, watch, watch.num_steps)
    device = engine.trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train(options, counting, 2, cuda_graph=False)  # the operations in a graph cannot be seen
    is_half = model._pace is not None and model._pace.precision == "bfloat16"  # noqa: SLF001 - what "auto" chose
    dtype = torch.bfloat16 if is_half else torch.float32
    low, median, high = statistics.quantiles(watch.seconds, n=4)
    operations = counting.counter.get_total_flops()
    peak = matrix_throughput(dtype, device)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(watch.profiler.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40))
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "precision": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "ms per step, median": round(1e3 * median, 1),
        "ms per step, quartiles": f"{1e3 * low:.1f} to {1e3 * high:.1f}",
        "steps per second": round(1 / median, 2),
        "GFLOP per step": round(operations / 1e9, 1),
        "TFLOP/s of the step": round(operations / median / 1e12, 3),
        "TFLOP/s of a matrix product": round(peak / 1e12, 3),
        "fraction": round(operations / median / peak, 3),
        "peak memory of the process, GiB" if not on_gpu else "peak memory on the GPU, GiB": round(memory / 2**30, 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True, help="configuration of a data module, see configs/data")
    parser.add_argument("--root", type=Path, help="root of the data set, instead of the configuration's")
    parser.add_argument("--category", help="category, instead of the configuration's")
    parser.add_argument("--set", type=yaml.safe_load, default={}, help="arguments of Pedenet, YAML")
    parser.add_argument("--steps", type=int, default=60, help="steps to time (default: %(default)s)")
    parser.add_argument("--accelerator", default="auto", help="as of the trainer: cpu, gpu, auto")
    for name, value in measure(parser.parse_args()).items():
        print(f"{name:<34}{value}")


if __name__ == "__main__":
    main()
