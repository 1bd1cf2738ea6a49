# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of earlier versions: what they lack, or have otherwise."""

from collections.abc import Mapping
from typing import Any

import torch

from anomalib_pedenet.networks import SMALL_CHANNELS
from anomalib_pedenet.post_processor import THRESHOLDS
from anomalib_pedenet.scorers.whitening import Whitening

# Names in a checkpoint's state: the highest scores of normal images' pixels, and of normal images, what each trained
# scale has learned, what was chosen from normal images, and the weights of the first convolution.
_LIMIT = "model.normal_limit"
_IMAGE_LIMIT = "model.image_limit"
_LEARNED = "model.learned"
_CHOSEN = "model._extra_state"
_FIRST_LAYER = "model.embedding_network.small_encoder.0.weight"
_DENSITY_NETWORKS = "model.density_networks."

BROUGHT_UP_TO_DATE = ("model_size", "lambda_den", "density_loss")
"""Hyper-parameters that earlier versions did not save, or with values that mean nothing now."""


def bring_up_to_date(checkpoint: dict[str, Any]) -> None:
    """Bring a checkpoint of an earlier version up to date.

    The first had scores without a limit, so that thresholds are brought into 0..1. Later ones did not keep what was
    learned at each scale, always had the product of the scales' maps, had no region of interest, did not whiten
    embeddings, and had one limit for pixels and images. Some measured places by themselves. The width of the encoder
    was not named. There was a density estimation network without a density loss, too, and in default trainings one for
    whitened embeddings. They score nothing and are dropped, and the optimizer with them: such trainings cannot go on.

    Args:
        checkpoint (dict[str, Any]): Loaded checkpoint, which is changed.
    """
    checkpoint["hyper_parameters"] = hyper_parameters_of(checkpoint)
    state = checkpoint["state_dict"]
    density_networks = [name for name in state if name.startswith(_DENSITY_NETWORKS)]
    if density_networks and checkpoint["hyper_parameters"]["lambda_den"] == 0:
        for name in density_networks:
            del state[name]
        checkpoint["optimizer_states"] = []
    if _LEARNED not in state and _CHOSEN in state:
        scales = len(state[_CHOSEN])
        trained = len({name.split(".")[2] for name in state if name.startswith("model.location_networks.")})
        state[_CHOSEN] = torch.cat([state[_CHOSEN], state[_CHOSEN].new_zeros(1)])
        state[_LEARNED] = torch.full((trained,), torch.nan)
        state |= {"model.map_offsets": torch.zeros(scales), "model.map_spreads": torch.ones(scales)}
        state["model.typical_score"] = torch.ones(())
    for name in ("model.place_calibration.gain", "model.place_calibration.offset"):
        state.pop(name, None)
    if _CHOSEN in state:
        state.setdefault("model.region.visible", torch.ones(1, 1, 1, 1))
    for size in [name.split(".")[2] for name in state if name.startswith("model.position_encodings.")]:
        for name, value in Whitening().state_dict().items():
            state.setdefault(f"model.whitenings.{size}.{name}", value)
    for name in [name for name in state if name.startswith("model.scorers.") and name.endswith(".blocks")]:
        state.setdefault(name.removesuffix("blocks") + "num_images", torch.tensor(0))
    if _LIMIT in state:
        state.setdefault(_IMAGE_LIMIT, state[_LIMIT])
        return
    state |= {_LIMIT: torch.ones(()), _IMAGE_LIMIT: torch.ones(())}
    for name in THRESHOLDS:
        if f"post_processor.{name}" in state:
            score = state[f"post_processor.{name}"]
            state[f"post_processor.{name}"] = score / (score + 1)


def hyper_parameters_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's hyper-parameters, with those of :data:`BROUGHT_UP_TO_DATE` as this version has them."""
    saved = dict(checkpoint.get("hyper_parameters", {}))
    if saved.get("density_loss") == "whitened":
        saved |= {"lambda_den": 0.0, "density_loss": "dagmm"}
    elif any(name.startswith(_DENSITY_NETWORKS) for name in checkpoint.get("state_dict", {})):
        saved.setdefault("lambda_den", 1e-4)  # a subclass may not have saved it
    filters = len(checkpoint.get("state_dict", {}).get(_FIRST_LAYER, ()))
    fitting = [size for size, channels in SMALL_CHANNELS.items() if channels[0] == filters]
    return {"model_size": fitting[0]} | saved if fitting else saved


def check_goes_on(checkpoint: Mapping[str, Any]) -> None:
    """Check that the training in a checkpoint, which has been brought up to date, can go on.

    Args:
        checkpoint (Mapping[str, Any]): Loaded checkpoint.

    Raises:
        ValueError: If it has no optimizer, or had one for other networks.
    """
    if not checkpoint.get("optimizer_states"):
        msg = (
            "The training in the checkpoint cannot go on: it was saved without its optimizer, or by an earlier version "
            "with a density estimation network that is no more. Begin anew. Testing and exporting need neither."
        )
        raise ValueError(msg)
