# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Inspect a folder of images with anomalib's inferencers: `OpenVINOInferencer`, or `TorchInferencer` for a file `.pt`.

    python examples/anomalib_inferencers.py model.xml path/to/images
    TRUST_REMOTE_CODE=1 python examples/anomalib_inferencers.py model.pt path/to/images

`openvino_folder.py` does the same without torch and anomalib, and draws overlays.
"""

import argparse
from pathlib import Path

import numpy as np
from anomalib.deploy import OpenVINOInferencer, TorchInferencer

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff"}


def main() -> None:
    """Print the score and the label of every image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model.xml, model.onnx or model.pt, as `anomalib export` writes them")
    parser.add_argument("images", type=Path, help="folder of images")
    options = parser.parse_args()
    inferencer = (
        TorchInferencer(options.model, device="cpu")
        if options.model.suffix == ".pt"
        else OpenVINOInferencer(options.model, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    )
    for path in sorted(file for file in options.images.rglob("*") if file.suffix.lower() in SUFFIXES):
        prediction = inferencer.predict(path)
        score, label = (np.asarray(value).item() for value in (prediction.pred_score, prediction.pred_label))
        print(f"{path}: score {score:.4f}, {'anomalous' if label else 'normal'}")


if __name__ == "__main__":
    main()
