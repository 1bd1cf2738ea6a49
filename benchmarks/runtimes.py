# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Load an exported model in the runtime that it is deployed with, and run it.

Each loader imports its own runtime only. Run as a program it scores random images twice and prints the peak memory of
such a process in bytes: on a CPU all of it, with Python and the runtime's libraries; on a GPU what torch allocated.

Example:
    ``python benchmarks/runtimes.py model.xml --runtime openvino --options '{"precision": "f32"}' --shape 1 3 256 256``
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Scores images ``[B, 3, H, W]``, float32 RGB in 0..1: results by their names. All arrays are in the host's memory."""


def load_torch(path: Path, threads: int, *, compiled: bool = False, device: str = "cpu") -> Run:
    """Load a Torch export, compiled at its first run if asked for. It is pickled: load none but your own."""
    import torch

    torch.set_num_threads(threads)
    torch._dynamo.config.cache_size_limit = 64  # noqa: SLF001 - of one forward, which all of anomalib's models share
    model = torch.load(path, map_location=device, weights_only=False)["model"].eval()
    call = torch.compile(model, dynamic=False) if compiled else model

    def run(images: np.ndarray) -> Mapping[str, np.ndarray]:
        with torch.inference_mode():
            results = call(torch.from_numpy(images).to(device))
        return {name: value.cpu().numpy() for name, value in results._asdict().items() if value is not None}

    return run


def load_onnx(path: Path, threads: int) -> Run:
    """Load an ONNX export in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (given,) = (node.name for node in session.get_inputs())
    names = [node.name for node in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {given: images}), strict=True))


def load_openvino(path: Path, threads: int, *, precision: str = "f32") -> Run:
    """Load an OpenVINO export on the CPU, for one image or one batch at a time.

    ``precision`` may be ``"default"`` for OpenVINO's choice: bfloat16 on processors that have it.
    """
    import openvino

    config: dict[str, str | int] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    config |= {} if precision == "default" else {"INFERENCE_PRECISION_HINT": precision}
    model = openvino.Core().compile_model(path, "CPU", config)
    return lambda images: {output.any_name: value for output, value in model(images).items()}


LOADERS: dict[str, Callable[..., Run]] = {"torch": load_torch, "onnx": load_onnx, "openvino": load_openvino}


def process_kib(field: str) -> int:
    """Return a figure of the process's memory in KiB, as Linux counts it: ``VmRSS`` for now, ``VmHWM`` for the peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Run a model and print the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--runtime", choices=LOADERS, required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of the loader, JSON")
    parser.add_argument("--shape", type=int, nargs=4, default=[1, 3, 256, 256])
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    run = LOADERS[options.runtime](options.path, options.threads, **options.options)
    images = np.random.default_rng(0).random(options.shape, dtype=np.float32)
    for _ in range(2):
        run(images)
    if options.options.get("device", "cpu") == "cpu":
        print(1024 * process_kib("VmHWM"))
    else:
        import torch

        print(torch.cuda.max_memory_allocated())


if __name__ == "__main__":
    main()
