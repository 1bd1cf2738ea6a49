# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Scores from training to test: the same in every mode, in their order, with thresholds however images are split."""

import copy
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder, InferenceBatch
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator, F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from sklearn.metrics import roc_auc_score
from torchvision.io import read_image

from anomalib_pedenet import Pedenet
from anomalib_pedenet.post_processor import PedenetPostProcessor
from tests.integration.conftest import write_dataset

SIZE = (112, 128)
SMALL: dict[str, Any] = {
    "image_size": SIZE,
    "max_steps": 4,
    "steps_per_image": 1,
    "crops_per_step": 1,
    "patches_per_step": 64,
    "pairs_per_step": 64,
    "bank_size": 60,
    "seed": 0,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), size=SIZE) / "stripes"


def folder(root: Path, **options: Any) -> Folder:  # noqa: ANN401
    defaults = {"train_batch_size": 3, "eval_batch_size": 2, "num_workers": 0, "seed": 0}
    return Folder(
        name="stripes",
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/square",
        mask_dir="ground_truth/square",
        **defaults | options,
    )


def engine_in(path: Path, **options: Any) -> Engine:  # noqa: ANN401
    return Engine(default_root_dir=path, enable_progress_bar=False, accelerator="cpu", logger=False, **options)


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, trained long enough for batch statistics to differ from the running averages."""
    engine = engine_in(tmp_path_factory.mktemp("trained"))
    engine.fit(Pedenet(**SMALL | {"max_steps": 12}), datamodule=folder(root, val_split_mode="same_as_test"))
    return Path(engine.best_model_path)


def images_of(root: Path) -> torch.Tensor:
    return torch.stack([read_image(str(path)) for path in sorted(root.glob("test/*/*.png"))]) / 255


# ------------------------------------------------------------------------------------------------------------- the mode


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_scoring_depends_neither_on_the_mode_nor_changes_the_model(trained: Path, root: Path, mode: bool) -> None:
    images = images_of(root)
    model = Pedenet.load_from_checkpoint(trained)
    assert model.training  # as Lightning leaves it
    evaluated = Pedenet.load_from_checkpoint(trained).eval()
    expected = evaluated(images)
    model.train(mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch, singles = model(images), [model(image[None]) for image in images]
    torch.testing.assert_close(batch.pred_score, expected.pred_score, rtol=0, atol=0)
    torch.testing.assert_close(batch.anomaly_map, expected.anomaly_map, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([single.pred_score for single in singles]), expected.pred_score)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)


def test_a_training_does_not_depend_on_the_mode(root: Path, tmp_path: Path) -> None:
    """Lightning trains a model in the mode in which it gets it."""
    weights = []
    for mode in (True, False):
        model = Pedenet(**SMALL).train(mode)
        engine_in(tmp_path / str(mode)).fit(model, datamodule=folder(root, val_split_mode="same_as_test"))
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        if name.startswith("model.embedding_network."):
            torch.testing.assert_close(value, weights[1][name], rtol=0, atol=0, msg=name)
    assert int(weights[0]["model.embedding_network.small_encoder.1.num_batches_tracked"]) == 4


# ------------------------------------------------------------------------------------------------ splits, order, labels


VAL_MODES = ("none", "same_as_test", "from_train", "from_test", "synthetic")
TEST_MODES = ("none", "from_dir", "synthetic")


@pytest.mark.parametrize(("val_mode", "test_mode"), itertools.product(VAL_MODES, TEST_MODES))
def test_normalised_scores_rank_as_raw_ones(root: Path, tmp_path: Path, val_mode: str, test_mode: str) -> None:
    torch.manual_seed(0)
    datamodule = folder(root, val_split_mode=val_mode, test_split_mode=test_mode)
    engine, model = engine_in(tmp_path), Pedenet(**SMALL)
    engine.fit(model, datamodule=datamodule)
    raw = {"pred_score": [], "anomaly_map": []}
    normalized = {"pred_score": [], "anomaly_map": []}
    truth = {"pred_score": [], "anomaly_map": []}
    with torch.no_grad():
        for batch in datamodule.test_dataloader():
            image, mask = model.pre_processor.transform(batch.image, batch.gt_mask)
            scores = model.model(image)
            for name, values in raw.items():
                values.append(getattr(scores, name).flatten())
                normalized[name].append(getattr(model.post_processor(scores), name).flatten())
            truth["pred_score"].append(batch.gt_label.int())
            truth["anomaly_map"].append(mask.int().flatten())
    (reported,) = engine.test(model, datamodule=datamodule, verbose=False)
    for name, metric in (("pred_score", "image_AUROC"), ("anomaly_map", "pixel_AUROC")):
        values, labels = torch.cat(normalized[name]), torch.cat(truth[name])
        assert 0 <= values.min() <= values.max() < 1
        if len(labels.unique()) == 2:
            expected = roc_auc_score(labels, torch.cat(raw[name]).double())
            assert roc_auc_score(labels, values.double()) == pytest.approx(expected, abs=1e-6)
            assert reported[metric] == pytest.approx(expected, abs=1e-6)
    threshold = model.post_processor.image_threshold
    if val_mode != "none":
        at_threshold = model.post_processor(InferenceBatch(pred_score=threshold[None]))
        assert at_threshold.pred_score.item() == pytest.approx(0.5, abs=1e-6)


def test_every_validation_batch_counts_alike(trained: Path, root: Path, tmp_path: Path) -> None:
    """Batches whose scores leave 0..1 are logits for torchmetrics, and others are not."""
    fields = (("pred_score", "gt_label", "image_"), ("anomaly_map", "gt_mask", "pixel_"))
    found = []
    for size in (1, 4, 6):
        metrics = [AUROC(fields=[score, label], prefix=prefix) for score, label, prefix in fields]
        model = Pedenet.load_from_checkpoint(trained, evaluator=Evaluator(val_metrics=metrics))
        datamodule = folder(root, val_split_mode="same_as_test", eval_batch_size=size)
        (result,) = engine_in(tmp_path).validate(model, datamodule=datamodule, verbose=False)
        found.append(result)
    for name, value in found[0].items():
        assert [result[name] for result in found] == pytest.approx([value] * 3, abs=1e-6)
    scores = model.model(model.pre_processor.transform(images_of(root))).pred_score
    labels = [path.parent.name == "square" for path in sorted(root.glob("test/*/*.png"))]
    assert found[0]["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)


def test_validation_scores_lie_within_0_and_1(trained: Path, root: Path) -> None:
    model = Pedenet.load_from_checkpoint(trained)
    strange = torch.cat([images_of(root), torch.zeros(1, 3, *SIZE), torch.ones(1, 3, *SIZE), torch.rand(1, 3, *SIZE)])
    scores = model.model(model.pre_processor.transform(strange))
    for values in (scores.pred_score, scores.anomaly_map):
        assert 0 <= values.min() <= values.max() < 1


# ----------------------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("trainer", "split"),
    [
        ({"limit_val_batches": 0}, {"val_split_mode": "same_as_test"}),
        ({}, {"val_split_mode": "from_test", "val_split_ratio": 0.05}),
        ({}, {"val_split_mode": "none"}),
    ],
    ids=["no batches", "no images", "no split"],
)
def test_without_validation_training_images_that_are_held_out_set_the_thresholds(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, trainer: dict[str, Any], split: dict[str, Any]
) -> None:
    engine, model = engine_in(tmp_path, **trainer), Pedenet(**SMALL)
    datamodule = folder(root, **split)
    with caplog.at_level(logging.INFO, logger="anomalib_pedenet"):
        engine.fit(model, datamodule=datamodule)
    # Of six images and one more each is as likely as any other to have the highest score.
    assert caplog.text.count("they are set by 6 training images") == 1
    assert "14.3 % will be called defective on average" in caplog.text
    files = sorted((root / "train/good").glob("*.png"))
    batches = [model.pre_processor(read_image(str(file))[None] / 255) for file in files]
    found = []
    for part in range(4):
        probe = copy.deepcopy(model.model)
        probe.fit([batch for index, batch in enumerate(batches) if index % 4 != part], 8)
        found += [probe(batch) for batch in batches[part::4]]
    images, pixels = (max(float(getattr(one, name).max()) for one in found) for name in ("pred_score", "anomaly_map"))
    assert float(model.post_processor.image_threshold) == pytest.approx(images, abs=1e-6)
    assert float(model.post_processor.pixel_threshold) == pytest.approx(pixels, abs=1e-6)

    caplog.clear()
    loaded = Pedenet.load_from_checkpoint(engine.best_model_path)
    with caplog.at_level(logging.WARNING, logger="anomalib_pedenet"):
        batches = engine_in(tmp_path).predict(loaded, data_path=root / "train/good")
        loaded.to_torch(tmp_path / "export")
    assert "thresholds" not in caplog.text
    assert torch.equal(loaded.post_processor.image_threshold, model.post_processor.image_threshold)
    assert batches is not None
    assert not any(batch.pred_label.any() for batch in batches)


@pytest.mark.parametrize(
    ("trainer", "epochs"),
    [
        ({"check_val_every_n_epoch": 2}, 3),
        ({"check_val_every_n_epoch": 10}, 3),
        ({"check_val_every_n_epoch": 2, "max_epochs": 1}, 1),
        ({"check_val_every_n_epoch": 2, "min_epochs": 3}, 3),
        ({"val_check_interval": 2, "limit_train_batches": 2}, 5),
        ({"val_check_interval": 0.4}, 3),
        ({"check_val_every_n_epoch": None, "val_check_interval": 4}, 3),
        ({"max_steps": 5}, 1),
    ],
    ids=str,
)
def test_the_last_weights_are_validated_and_saved(
    root: Path, tmp_path: Path, trainer: dict[str, Any], epochs: int
) -> None:
    datamodule = folder(root, val_split_mode="same_as_test", train_batch_size=2)
    model = Pedenet(**SMALL | {"max_steps": 18, "learning_rate": 1e-2, "lr_schedule": "constant"})
    engine = engine_in(tmp_path, **trainer)
    engine.fit(model, datamodule=datamodule)
    assert engine.trainer.current_epoch == epochs
    assert_thresholds_are_of_the_weights(engine, model, datamodule)
    for name, value in trainer.items():
        if name == "check_val_every_n_epoch":
            assert engine.trainer.check_val_every_n_epoch == value  # as it was


def assert_thresholds_are_of_the_weights(engine: Engine, model: Pedenet, datamodule: Folder) -> None:
    """Check the model and its checkpoint against a validation anew."""
    saved = torch.load(engine.best_model_path, weights_only=True)
    assert saved["global_step"] == engine.trainer.global_step
    name = "post_processor._image_threshold"
    assert saved["state_dict"][name].equal(model.post_processor.image_threshold)
    weights = "model.embedding_network.small_encoder.0.weight"
    assert saved["state_dict"][weights].equal(model.state_dict()[weights])
    again = Pedenet.load_from_checkpoint(engine.best_model_path)
    again.post_processor._image_threshold.fill_(torch.nan)
    engine_in(Path(engine.trainer.default_root_dir)).validate(again, datamodule=datamodule, verbose=False)
    torch.testing.assert_close(again.post_processor.image_threshold, model.post_processor.image_threshold)


def test_an_interrupted_validation_leaves_nothing_in_the_thresholds(root: Path, tmp_path: Path, trained: Path) -> None:
    datamodule = folder(root, val_split_mode="same_as_test")
    model = Pedenet.load_from_checkpoint(trained)
    expected = model.post_processor.image_threshold.clone()
    # As a validation that was stopped in its midst leaves it.
    for score in (0.01, 0.99):
        metric = model.post_processor._image_threshold_metric
        metric.preds.append(torch.tensor([score]))
        metric.target.append(torch.tensor([score < 0.5]))
    engine_in(tmp_path).validate(model, datamodule=datamodule, verbose=False)
    torch.testing.assert_close(model.post_processor.image_threshold, expected)


def test_the_only_defective_validation_image_is_called_defective(root: Path, tmp_path: Path) -> None:
    model = Pedenet(**SMALL)
    datamodule = folder(root, val_split_mode="same_as_test")
    datamodule.setup()
    samples = datamodule.val_data.samples
    datamodule.val_data.samples = samples[samples.label_index == 0].iloc[:2]
    one = samples[samples.label_index == 1].iloc[:1]
    datamodule.val_data.samples = type(samples)(samples.loc[[*datamodule.val_data.samples.index, *one.index]])
    engine = engine_in(tmp_path)
    engine.fit(model, datamodule=datamodule)
    (batch,) = engine.predict(model, data_path=one.image_path.iloc[0])
    assert batch.pred_score[0] != 0.5
    assert bool(batch.pred_label[0])


# ----------------------------------------------------------------------------------------------------------- components


def test_components_that_are_given_at_loading_are_used(trained: Path) -> None:
    given = PedenetPostProcessor(image_sensitivity=0.8)
    evaluator = Evaluator(test_metrics=[AUROC(fields=["pred_score", "gt_label"])])
    model = Pedenet.load_from_checkpoint(trained, post_processor=given, evaluator=evaluator, visualizer=False)
    assert model.post_processor is given
    assert given.image_sensitivity == 0.8
    assert torch.isfinite(given.image_threshold)  # the checkpoint's
    assert model.evaluator is evaluator
    assert model.visualizer is None
    other = Pedenet.load_from_checkpoint(trained, post_processor=PostProcessor())
    assert torch.isfinite(other.post_processor.image_threshold)
    assert Pedenet.load_from_checkpoint(trained, post_processor=False).post_processor is None


def test_another_image_size_is_used_once_the_bank_is_built_anew(trained: Path, root: Path, tmp_path: Path) -> None:
    model = Pedenet.load_from_checkpoint(trained, image_size=(128, 144))
    assert tuple(model.hparams.image_size) == tuple(model.input_size) == (128, 144)
    with pytest.raises(RuntimeError, match="no memory bank yet"):
        model(images_of(root))
    engine_in(tmp_path).validate(model, datamodule=folder(root, val_split_mode="same_as_test"), verbose=False)
    assert model(images_of(root)).anomaly_map.shape[-2:] == (128, 144)


def test_a_checkpoint_of_unbounded_scores_is_brought_up_to_date(trained: Path, root: Path, tmp_path: Path) -> None:
    """Earlier versions had no limit: their thresholds are distances."""
    checkpoint = torch.load(trained, weights_only=True)
    state = checkpoint["state_dict"]
    limits = {"pixel": state.pop("model.normal_limit"), "image": state.pop("model.image_limit")}
    for name in ("_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max"):
        score, limit = state[f"post_processor.{name}"], limits[name.strip("_").split("_")[0]]
        state[f"post_processor.{name}"] = limit * score / (1 - score)
    torch.save(checkpoint, tmp_path / "old.ckpt")
    new, old = Pedenet.load_from_checkpoint(trained), Pedenet.load_from_checkpoint(tmp_path / "old.ckpt")
    images = images_of(root)
    torch.testing.assert_close(old(images).pred_score, new(images).pred_score, rtol=1e-4, atol=1e-5)
    assert old(images).pred_label.equal(new(images).pred_label)


def test_the_metric_of_the_threshold_is_a_subclass_of_anomalibs() -> None:
    assert isinstance(PedenetPostProcessor()._image_threshold_metric, F1AdaptiveThreshold)
