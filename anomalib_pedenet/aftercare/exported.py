# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Other thresholds for models that are exported already.

An export's score is ``d / (d + t)`` for a distance ``d`` to what is normal and a threshold ``t``, which is part of the
graph. Another threshold takes a few operations behind it, and no training, no checkpoint and no images.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_utilities.core.imports import module_available

from anomalib_pedenet.aftercare.inspection import THRESHOLD
from anomalib_pedenet.host.checkpoint_io import written_whole

# Outputs of an export: scores, what is flagged by them, and which of the thresholds they go by.
_OUTPUTS = (("pred_score", "pred_label", "image"), ("anomaly_map", "pred_mask", "pixel"))


def set_export_thresholds(
    model_path: str | Path,
    image: float = THRESHOLD,
    pixel: float = THRESHOLD,
    output: str | Path | None = None,
) -> Path:
    """Move the thresholds of an exported model.

    What has the given score now is at 0.5 afterwards, the threshold, and all scores move with it, in the same order.

    Args:
        model_path (str | Path): ``model.xml`` of OpenVINO or ``model.onnx``.
        image (float): Score above which an image is to be flagged, as the export gives it now, above 0 and below 1.
        pixel (float): The same for pixels.
        output (str | Path | None): Where to save the changed model, of the same format. Defaults to the place of the
            old one.

    Returns:
        Path: The file that was written.

    Raises:
        ValueError: If a threshold is outside its range, or the file is not such an export.
        ModuleNotFoundError: If the library of the format is not installed.
    """
    path, target = Path(model_path), Path(output or model_path)
    thresholds = {"image": image, "pixel": pixel}
    for name, value in thresholds.items():
        if not 0 < value < 1:
            msg = f"The {name} threshold must be a score above 0 and below 1, got {value:g}."
            raise ValueError(msg)
    formats: dict[str, tuple[str, Callable[[Path, Path, dict[str, float]], None]]] = {
        ".xml": ("openvino", _change_openvino),
        ".onnx": ("onnx", _change_onnx),
    }
    if path.suffix not in formats or not path.is_file():
        msg = f"There is no exported model {path}: give the model.xml or model.onnx of an export."
        raise ValueError(msg)
    if target.suffix != path.suffix:
        msg = f"The changed model {target} must end with {path.suffix}, as {path} does."
        raise ValueError(msg)
    library, change = formats[path.suffix]
    if not module_available(library):
        msg = f"To change {path} takes {library}: pip install 'anomalib-pedenet[openvino]'."
        raise ModuleNotFoundError(msg, name=library)
    target.parent.mkdir(parents=True, exist_ok=True)
    change(path, target, thresholds)
    return target


def _unit(threshold: float) -> float:
    """Return the distance at a threshold, in units of that at 0.5."""
    return threshold / (1 - threshold)


def _check_outputs(path: Path, names: set[str]) -> None:
    """Check that a model has the outputs of an export.

    Raises:
        ValueError: If it has not.
    """
    missing = [name for scores, flags, _ in _OUTPUTS for name in (scores, flags) if name not in names]
    if missing:
        msg = f"{path} has no output {missing[0]}: give a model that anomalib exported."
        raise ValueError(msg)


def _change_openvino(path: Path, target: Path, thresholds: dict[str, float]) -> None:
    """Change a model of OpenVINO."""
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    # Not mapped into memory: it may be written where it was read.
    model = openvino.Core().read_model(path, config={"ENABLE_MMAP": False})
    results = {name: result for result in model.get_results() for name in result.output(0).get_names()}
    _check_outputs(path, set(results))

    def number(value: float) -> Any:  # noqa: ANN401 - a node of OpenVINO
        return ops.constant(np.float32(value))

    def replace(name: str, node: Any) -> Any:  # noqa: ANN401
        source = results[name].input_value(0)
        source.get_tensor().set_names(set())
        node.output(0).get_tensor().set_names({name})
        results[name].input(0).replace_source_output(node.output(0))
        return source

    for scores, flags, name in _OUTPUTS:
        before = results[scores].input_value(0)
        element = before.get_element_type()
        value = ops.convert(before, "f32")
        rest = ops.multiply(ops.subtract(number(1.0), value), number(_unit(thresholds[name])))
        moved = ops.divide(value, ops.add(value, rest))
        flag_type = results[flags].input_value(0).get_element_type()
        flagged = ops.convert(ops.greater(moved, number(THRESHOLD)), flag_type.get_type_name())
        replace(scores, ops.convert(moved, element.get_type_name()))
        replace(flags, flagged)
    model.validate_nodes_and_infer_types()
    part = target.with_name(f".{target.stem}.part.xml")
    openvino.save_model(model, part, compress_to_fp16=False)
    part.with_suffix(".bin").replace(target.with_suffix(".bin"))
    part.replace(target)


def _change_onnx(path: Path, target: Path, thresholds: dict[str, float]) -> None:
    """Change a model of ONNX."""
    import onnx
    from onnx import helper

    model = onnx.load(path)
    graph = model.graph
    _check_outputs(path, {output.name for output in graph.output})
    taken = {name for node in graph.node for name in node.output}

    def rename(name: str) -> str:
        """Give what has a name another one, and return that."""
        other = name
        while other in taken:
            other += "_before"
        taken.add(other)
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [other if found == name else found for found in names]
        return other

    for scores, flags, name in _OUTPUTS:
        before = rename(scores)
        rename(flags)
        constants = {f"{before}_one": 1.0, f"{before}_unit": _unit(thresholds[name]), f"{before}_half": THRESHOLD}
        graph.initializer.extend(
            helper.make_tensor(key, onnx.TensorProto.FLOAT, [], [value]) for key, value in constants.items()
        )
        one, unit, half = constants
        graph.node.extend(
            [
                helper.make_node("Sub", [one, before], [f"{before}_rest"]),
                helper.make_node("Mul", [f"{before}_rest", unit], [f"{before}_share"]),
                helper.make_node("Add", [before, f"{before}_share"], [f"{before}_sum"]),
                helper.make_node("Div", [before, f"{before}_sum"], [scores]),
                helper.make_node("Greater", [scores, half], [flags]),
            ]
        )
    onnx.checker.check_model(model)
    with written_whole(target) as file:
        file.write(model.SerializeToString())
