# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What comes after a training: inspection as anomalib's, explanations as a search of all patches, and undone edits."""

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.callbacks.tiler_configuration import TilerConfigurationCallback
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from PIL import Image

from anomalib_pedenet import Pedenet
from anomalib_pedenet.aftercare import (
    Inspector,
    calibrate_checkpoint,
    mask_checkpoint,
    set_export_thresholds,
    teach_checkpoint,
    undo_edit,
)
from anomalib_pedenet.aftercare.command import main
from anomalib_pedenet.aftercare.drift import draw_drift, find_drift
from anomalib_pedenet.aftercare.edits import EDITS, edit_checkpoint, read_checkpoint
from anomalib_pedenet.aftercare.teaching import LostDefectError
from anomalib_pedenet.training.out_of_fold import score_out_of_fold
from tests.integration.conftest import write_dataset

DOCUMENT = Path(__file__).parents[2] / "docs/tutorials/first_week.md"
SCORERS = ["exact", "gaussian_mixture"]


@pytest.fixture(scope="module")
def trainings(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Engine, Path]]:
    """A short training with each scorer that can be taught."""
    trainings = {}
    for scorer in SCORERS:
        datamodule = MVTecAD(root=dataset_root, category="stripes", train_batch_size=3, num_workers=0)
        model = Pedenet(
            image_size=(144, 160),
            max_steps=6,
            steps_per_image=1,
            crops_per_step=1,
            bank_size=1_000,
            scorer=scorer,
            train_precision="float32",
            seed=1,
        )
        engine = Engine(default_root_dir=tmp_path_factory.mktemp("results"), enable_progress_bar=False)
        engine.fit(model, datamodule=datamodule)
        trainings[scorer] = engine, Path(engine.best_model_path)
    return trainings


@pytest.fixture
def trained(request: pytest.FixtureRequest, trainings: dict[str, tuple[Engine, Path]]) -> tuple[Engine, Path]:
    return trainings[getattr(request, "param", "exact")]


with_both_scorers = pytest.mark.parametrize("trained", SCORERS, indirect=True)


@pytest.fixture
def checkpoint(trained: tuple[Engine, Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copy(trained[1], tmp_path / "model.ckpt"))


@pytest.fixture(scope="module")
def stripes(dataset_root: Path) -> Path:
    return dataset_root / "stripes"


def state(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)["state_dict"]


def assert_equal_states(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=0, rtol=0, equal_nan=True)


def test_an_inspection_is_what_anomalib_predicts(trained: tuple[Engine, Path], stripes: Path) -> None:
    engine, path = trained
    expected = {
        Path(batch.image_path[index]).name: (batch.pred_score[index], batch.anomaly_map[index])
        for batch in engine.predict(model=Pedenet(), data_path=stripes / "test/square", ckpt_path=path)
        for index in range(len(batch.image))
    }
    found = list(Inspector(path).inspect(stripes / "test/square"))
    assert [one.path.name for one in found] == sorted(expected)
    for one in found:
        score, anomaly_map = expected[one.path.name]
        assert one.score == pytest.approx(float(score), abs=1e-6)
        np.testing.assert_allclose(one.anomaly_map, anomaly_map.squeeze().numpy(), atol=1e-6)
        assert one.image.shape == (*one.anomaly_map.shape, 3)
        assert one.image[60, 70].tolist() == [240, 240, 240]  # the square, in its place


def test_a_model_that_was_trained_with_tiles_is_inspected_with_them(
    stripes: Path, dataset_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiles = TilerConfigurationCallback(enable=True, tile_size=[96, 64], stride=[48, 48], remove_border_count=1)
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False, callbacks=[tiles])
    datamodule = MVTecAD(root=dataset_root, category="stripes", train_batch_size=3, num_workers=0)
    model = Pedenet(image_size=(144, 160), max_steps=6, steps_per_image=1, crops_per_step=1, bank_size=500)
    engine.fit(model, datamodule=datamodule)
    checkpoint = Path(engine.best_model_path)
    source = stripes / "test/square"
    expected = {
        prediction.image_path[0]: float(prediction.pred_score)
        for prediction in engine.predict(model, data_path=source, ckpt_path=checkpoint)
    }
    inspector = Inspector(checkpoint)
    tiler = inspector.model.model.tiler
    assert (tiler.tile_size_h, tiler.tile_size_w, tiler.stride_h, tiler.stride_w) == (96, 64, 48, 48)
    assert tiler.remove_border_count == 1
    patches = inspector.normal_patches(stripes / "train/good")
    assert patches is None
    assert "no patches are compared" in caplog.text
    found = {str(inspection.path): inspection.score for inspection in inspector.inspect(source, None, patches)}
    assert found == pytest.approx(expected, abs=1e-5)
    assert list(inspector.inspect_training_images(stripes / "train/good"))
    calibrate_checkpoint(checkpoint, 0.25, training_images=stripes / "train/good")
    assert Inspector(checkpoint).model.model.tiler is not None
    many = [stripes / "train", stripes / "test"]
    with pytest.raises(ValueError, match="the model scores tiles: train one without"):
        find_drift(inspector, inspector.prepared(many), inspector.prepared(many))
    # Another callback's tiles stay, and a training without any begins without.
    other = Pedenet.load_from_checkpoint(checkpoint)
    assert other.model.tiler is not None
    Engine(default_root_dir=tmp_path, enable_progress_bar=False, max_steps=1).fit(other, datamodule=datamodule)
    assert other.model.tiler is None


@with_both_scorers
def test_an_explanation_is_what_a_search_of_all_patches_finds(trained: tuple[Engine, Path], stripes: Path) -> None:
    inspector = Inspector(trained[1])
    model = inspector.model.model
    (found,) = inspector.inspect(
        stripes / "test/square/000.png", normal_patches=inspector.normal_patches(stripes / "train/good")
    )
    explanation = found.explanation
    assert explanation is not None
    top, left, size, _ = explanation.box
    assert top < 80
    assert top + size > 40  # the square's rows, and its columns
    assert left < 90
    assert left + size > 50
    with torch.no_grad():
        patches = dict(model.patch_scores(inspector.prepared(stripes / "test/square/000.png")[0]))[size]
        query = patches.embeddings[0, top // model.stride, left // model.stride]
        distances = {}
        for file in sorted((stripes / "train/good").iterdir()):
            grid = dict(model.patch_scores(inspector.prepared(file)[0]))[size].embeddings[0]
            for row in range(grid.shape[0]):
                for column in range(grid.shape[1]):
                    place = (file.name, row * model.stride, column * model.stride)
                    distances[place] = float((grid[row, column] - query).norm())
    normal = (explanation.normal_path.name, explanation.normal_box.top, explanation.normal_box.left)
    assert distances[normal] == pytest.approx(min(distances.values()), rel=1e-3)  # patches are kept in half precision
    assert explanation.distance > 2  # in units of that between normal images


@with_both_scorers
def test_a_training_image_is_scored_by_what_is_fitted_on_the_others(
    trained: tuple[Engine, Path], stripes: Path
) -> None:
    inspector = Inspector(trained[1])
    images = inspector.prepared(stripes / "train/good")
    before = {name: value.clone() for name, value in inspector.model.state_dict().items()}
    scores = {index: float(found.pred_score) for index, found in score_out_of_fold(inspector.model.model, images, 8)}
    assert_equal_states(before, inspector.model.state_dict())
    assert sorted(scores) == list(range(6))
    # The second of four parts: images 1 and 5.
    with torch.no_grad():
        inspector.model.model.fit([images[index] for index in (0, 2, 3, 4)], stride=8)
        assert [scores[index] for index in (1, 5)] == [
            pytest.approx(float(inspector.model.model(images[index]).pred_score), abs=1e-6) for index in (1, 5)
        ]


def test_a_defect_among_the_training_images_comes_first(
    trained: tuple[Engine, Path], stripes: Path, tmp_path: Path
) -> None:
    for file in (stripes / "train/good").iterdir():
        shutil.copy(file, tmp_path)
    shutil.copy(stripes / "test/square/000.png", tmp_path / "dirty.png")
    found = Inspector(trained[1]).inspect_training_images(tmp_path)
    ranked = sorted(found, key=lambda one: one.score, reverse=True)
    assert ranked[0].path.name == "dirty.png"
    assert ranked[0].score > ranked[1].score + 0.1


def test_calibration_sets_both_thresholds_and_is_undone(checkpoint: Path, stripes: Path, tmp_path: Path) -> None:
    original = state(checkpoint)
    good, other = stripes / "train/good", stripes / "test/good"
    output = tmp_path / "new" / "calibrated.ckpt"
    done = calibrate_checkpoint(checkpoint, 0.1, training_images=[good], good_images=[other], output=output)
    assert done.ckpt_path == output
    assert done.chosen.num_images == 9
    assert done.flagged_now == 0
    assert_equal_states(original, state(checkpoint))
    changed = state(output)
    differing = {name for name, value in original.items() if not torch.equal(changed[name], value)}
    assert differing == {"post_processor._image_threshold", "post_processor._pixel_threshold"}
    # The highest of all is at the threshold, which is not above it.
    inspector = Inspector(output)
    scores = [one.score for one in [*inspector.inspect_training_images(good), *inspector.inspect(other)]]
    assert max(scores) == pytest.approx(0.5, abs=1e-5)
    assert undo_edit(output)["what"] == "calibrate"
    assert_equal_states(original, state(output))


@with_both_scorers
def test_what_is_taught_is_passed_and_undone(checkpoint: Path, stripes: Path) -> None:
    original = state(checkpoint)
    square = stripes / "test/square"
    calibrate_checkpoint(checkpoint, 0.1, [stripes / "train/good"], [stripes / "test/good"])
    calibrated = state(checkpoint)
    lessons, written = teach_checkpoint(checkpoint, [square / "000.png"], known_good=[stripes / "test/good"])
    assert written == checkpoint
    taught, *others = lessons
    assert taught.before > 0.5 > taught.after
    assert all(lesson.after < lesson.before + 0.02 for lesson in others)
    found = {one.path: one.score for one in Inspector(checkpoint).inspect(stripes / "test")}
    assert {lesson.path: found[lesson.path] for lesson in lessons} == {
        lesson.path: pytest.approx(lesson.after, abs=1e-6) for lesson in lessons
    }
    with pytest.raises(ValueError, match=r"000.png was taught to .* already: leave it out, or undo that first"):
        teach_checkpoint(checkpoint, [square / "000.png"])
    assert [edit["what"] for edit in read_checkpoint(checkpoint)[EDITS]] == ["calibrate", "teach"]
    undo_edit(checkpoint)
    assert_equal_states(calibrated, state(checkpoint))
    undo_edit(checkpoint)
    assert_equal_states(original, state(checkpoint))
    with pytest.raises(ValueError, match="nothing to undo"):
        undo_edit(checkpoint)


@with_both_scorers
def test_a_known_defect_is_not_lost(checkpoint: Path, stripes: Path, tmp_path: Path) -> None:
    original = state(checkpoint)
    square = stripes / "test/square/000.png"
    shutil.copy(square, tmp_path / "defect.png")
    with pytest.raises(LostDefectError, match=r"1 known defect\(s\) would no longer be flagged, .*defect.png") as error:
        teach_checkpoint(checkpoint, [square], known_defects=[tmp_path / "defect.png"])
    assert [lesson.role for lesson in error.value.lessons] == ["taught", "defective"]
    assert_equal_states(original, state(checkpoint))
    lessons, _ = teach_checkpoint(checkpoint, [square], known_defects=[tmp_path / "defect.png"], force=True)
    assert lessons[1].is_lost


def paint(file: Path, *window: slice) -> Path:
    """Write an image that is white in a window."""
    pixels = np.zeros((144, 160), dtype=np.uint8)
    pixels[window] = 255
    Image.fromarray(pixels).save(file)
    return file


def test_what_lies_outside_of_a_region_is_not_taught(
    trainings: dict[str, tuple[Engine, Path]], stripes: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copy(trainings["exact"][1], tmp_path / "model.ckpt"))
    two = np.array(Image.open(stripes / "test/square/000.png"))
    two[90:120, 20:50] = np.random.default_rng(0).integers(0, 256, (30, 30, 3))
    Image.fromarray(two).save(tmp_path / "two.png")
    region = paint(tmp_path / "region.png", slice(80, 144), slice(0, 70))
    before = next(iter(Inspector(checkpoint).inspect(tmp_path / "two.png"))).anomaly_map
    lessons, _ = teach_checkpoint(checkpoint, [tmp_path / "two.png"], region=region)
    assert lessons[0].after > 0.5  # the square is a defect still
    after = next(iter(Inspector(checkpoint).inspect(tmp_path / "two.png"))).anomaly_map
    marked = (slice(95, 120), slice(20, 45))  # away from the square
    assert after[marked].max() < 0.5 < before[marked].max()
    row, column = np.unravel_index(after.argmax(), after.shape)
    assert 24 < row < 96
    assert 34 < column < 106  # at the square, or less than a small patch away
    Image.fromarray(two[:100]).save(tmp_path / "smaller.png")
    with pytest.raises(ValueError, match=r"images of one size, but .* has 144x160 px and .*smaller.png 100x160"):
        teach_checkpoint(checkpoint, [stripes / "test/square/001.png", tmp_path / "smaller.png"], region=region)


def test_known_defects_are_flagged_whatever_the_rate(checkpoint: Path, stripes: Path, tmp_path: Path) -> None:
    faint = np.array(Image.open(stripes / "test/good/000.png")).astype(float)
    faint[60:64, 60:64] += 3
    (tmp_path / "faint").mkdir()
    Image.fromarray(faint.astype(np.uint8)).save(tmp_path / "faint/000.png")
    good = [stripes / "train/good"]
    plain = calibrate_checkpoint(checkpoint, 0.2, training_images=good, output=tmp_path / "plain.ckpt")
    assert plain.thresholds.image == plain.chosen.threshold
    (score,) = Inspector(tmp_path / "plain.ckpt").inspect(tmp_path / "faint")
    assert not score.is_flagged
    done = calibrate_checkpoint(checkpoint, 0.2, training_images=good, known_defects=tmp_path / "faint")
    assert done.thresholds.image < plain.thresholds.image
    (score,) = Inspector(checkpoint).inspect(tmp_path / "faint")
    assert score.is_flagged
    assert score.score == pytest.approx(0.5, abs=1e-5)
    # Those that are found anyway change nothing.
    easy = calibrate_checkpoint(checkpoint, 0.2, training_images=good, known_defects=stripes / "test/square")
    assert easy.thresholds.image == plain.thresholds.image


@with_both_scorers
def test_a_masked_checkpoint_looks_at_its_region_alone(checkpoint: Path, stripes: Path, tmp_path: Path) -> None:
    original = state(checkpoint)
    roi = paint(tmp_path / "roi.png", slice(None), slice(0, 80))
    picture = tmp_path / "region.png"
    done = mask_checkpoint(checkpoint, roi, stripes / "train/good", picture)
    assert done.visible == pytest.approx(0.5, abs=0.02)
    inspector = Inspector(checkpoint)
    width = inspector.model.model.region.visible.shape[-1]
    (tmp_path / "other").mkdir()
    for file in sorted((stripes / "test/square").iterdir()):
        pixels = np.array(Image.open(file))
        pixels[:, 80:] = 255 - pixels[:, 80:]
        Image.fromarray(pixels).save(tmp_path / "other" / file.name)
    for one, other in zip(
        inspector.inspect(stripes / "test/square"), inspector.inspect(tmp_path / "other"), strict=True
    ):
        assert one.score == other.score
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
        assert one.is_flagged  # the part of the square in the left half
        assert not one.anomaly_map[:, width // 2 :].any()
    # Training images score as is expected of good ones.
    scores = [one.score for one in inspector.inspect_training_images(stripes / "train/good")]
    assert max(scores) == pytest.approx(0.5, abs=1e-5)
    shown = np.array(Image.open(picture))
    assert shown[:, : width // 2 - 2].mean() > 3 * shown[:, width // 2 + 2 :].mean()
    undone = undo_edit(checkpoint)
    assert undone["what"] == "mask"
    assert_equal_states(original, state(checkpoint))


def test_a_mask_that_changes_the_scorer_is_undone(checkpoint: Path) -> None:
    """With another scorer in use the state has other entries."""
    changed = read_checkpoint(checkpoint)
    names = {name for name in changed["state_dict"] if name.startswith("model.scorers.")}
    edit_checkpoint(
        checkpoint,
        None,
        "mask",
        {},
        {"model.scorers.16.other": torch.ones(3), "model.scorers.16.typical_score": torch.ones(())},
        replaced=("model.scorers.",),
    )
    assert {name for name in state(checkpoint) if name.startswith("model.scorers.")} == {
        "model.scorers.16.other",
        "model.scorers.16.typical_score",
    }
    undo_edit(checkpoint)
    assert {name for name in state(checkpoint) if name.startswith("model.scorers.")} == names
    assert_equal_states(changed["state_dict"], state(checkpoint))


def test_masks_that_hide_nothing_or_all_are_refused(checkpoint: Path, stripes: Path, tmp_path: Path) -> None:
    original = state(checkpoint)
    empty = paint(tmp_path / "empty.png", slice(0))
    for roi, message in ((empty, "black all over"), ("auto", "No background of one colour was found")):
        with pytest.raises(ValueError, match=message):
            mask_checkpoint(checkpoint, roi, stripes / "train/good")
    assert_equal_states(original, state(checkpoint))


@with_both_scorers
def test_an_export_after_a_lesson_has_learned_it(checkpoint: Path, stripes: Path, tmp_path: Path) -> None:
    from anomalib.deploy import ExportType, OpenVINOInferencer

    lessons, _ = teach_checkpoint(checkpoint, [stripes / "test/square/000.png"])
    exported = Engine().export(Pedenet(), ExportType.OPENVINO, export_root=tmp_path, ckpt_path=checkpoint)
    prediction = OpenVINOInferencer(exported, config={"INFERENCE_PRECISION_HINT": "f32"}).predict(
        stripes / "test/square/000.png"
    )
    assert float(np.squeeze(prediction.pred_score)) == pytest.approx(lessons[0].after, abs=1e-3)


@pytest.mark.parametrize("export_type", ["onnx", "openvino"])
def test_an_export_gets_other_thresholds(
    export_type: str, trainings: dict[str, tuple[Engine, Path]], stripes: Path, tmp_path: Path
) -> None:
    import onnxruntime
    import openvino

    def scores_of(path: Path) -> dict[str, np.ndarray]:
        image = np.array(Image.open(stripes / "test/square/000.png"), dtype=np.float32).transpose(2, 0, 1)[None] / 255
        if path.suffix == ".onnx":
            session = onnxruntime.InferenceSession(path)
            return dict(
                zip([one.name for one in session.get_outputs()], session.run(None, {"input": image}), strict=True)
            )
        found = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image)
        return {name: found[name] for name in ("pred_score", "pred_label", "anomaly_map", "pred_mask")}

    exported = Engine().export(Pedenet(), export_type, export_root=tmp_path, ckpt_path=trainings["exact"][1])
    path = Path(exported)
    before = scores_of(path)
    score = float(before["pred_score"].squeeze())
    changed = set_export_thresholds(path, score * 0.99, 0.7, tmp_path / f"new/model{path.suffix}")
    after = scores_of(changed)
    # In units of the threshold distances are divided by that of the new one.
    for name, threshold in (("pred_score", score * 0.99), ("anomaly_map", 0.7)):
        distance = before[name] / (1 - before[name]) / (threshold / (1 - threshold))
        np.testing.assert_allclose(after[name], distance / (1 + distance), atol=1e-5)
    assert after["pred_label"].all()
    np.testing.assert_array_equal(after["pred_mask"], after["anomaly_map"] > 0.5)
    assert {name: (value.shape, value.dtype) for name, value in after.items()} == {
        name: (value.shape, value.dtype) for name, value in before.items()
    }
    set_export_thresholds(path, image=1 - (1 - score) * 0.99)
    assert not scores_of(path)["pred_label"].any()
    # In place, and back again.
    set_export_thresholds(changed, pixel=0.3)
    np.testing.assert_allclose(scores_of(changed)["anomaly_map"], before["anomaly_map"], atol=1e-5)


def test_exports_and_thresholds_that_cannot_be_are_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    with pytest.raises(ValueError, match=r"image threshold must be a score above 0 and below 1, got 1"):
        set_export_thresholds(tmp_path / "model.onnx", image=1.0)
    with pytest.raises(ValueError, match=r"no exported model .*model.pt: give the model.xml or model.onnx"):
        set_export_thresholds(tmp_path / "model.pt")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Abs", ["input"], ["output"])], "other", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "a.onnx")
    content = (tmp_path / "a.onnx").read_bytes()
    with pytest.raises(ValueError, match="has no output pred_score: give a model that anomalib exported"):
        set_export_thresholds(tmp_path / "a.onnx", image=0.6)
    with pytest.raises(ValueError, match=r"must end with .onnx"):
        set_export_thresholds(tmp_path / "a.onnx", output=tmp_path / "a.xml")
    assert (tmp_path / "a.onnx").read_bytes() == content


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["anomalib-pedenet", *map(str, arguments)])
    main()


def test_the_week_of_the_documentation(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of the page in its order, then its Python."""
    # More training images than the model has seen, so that a change could be told.
    parts = (write_dataset(tmp_path, num_train=12) / "stripes").rename(tmp_path / "parts")
    (parts / "test/square").rename(parts / "test/defect")
    for folder in ("new_parts", "false_alarms"):
        (tmp_path / folder).mkdir()
    shutil.copytree(parts / "train/good", tmp_path / "today")
    shutil.copy(parts / "test/defect/000.png", tmp_path / "new_parts")
    marked = np.array(Image.open(parts / "test/good/000.png"))
    marked[20:50, 100:130] = 0
    Image.fromarray(marked).save(tmp_path / "false_alarms/mark.png")
    paint(tmp_path / "roi.png", slice(None), slice(0, 140))
    monkeypatch.chdir(tmp_path)
    original = state(checkpoint)
    text = DOCUMENT.read_text(encoding="utf-8")
    commands = [shlex.split(line)[1:] for line in re.findall(r"^anomalib-pedenet .*", text, re.M)]
    assert [command[0] for command in commands] == [
        "report",
        "report",
        "explain",
        "mask",
        "calibrate",
        "teach",
        "undo",
        "threshold",
        "drift",
    ]
    Engine().export(Pedenet(), "openvino", export_root=tmp_path, ckpt_path=checkpoint)
    printed = []
    for command in commands:
        run(monkeypatch, *command)
        printed.append(capsys.readouterr().out)
    assert str(tmp_path / "report.html") in printed[0].splitlines()[-1]
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert printed[2].count(".png") == 10
    assert re.search("8[78]% of the images are looked at", printed[3])
    assert "Of 12 good images" in printed[4]
    assert "Of 1 image(s) taught, 1 were flagged before, 0 are now." in printed[5]
    assert "Of 3 image(s) defective, 3 were flagged before, 3 are now." in printed[5]
    assert "Taken back: teach" in printed[6]
    assert "is at the threshold of 0.5 now" in printed[7]
    assert "No change was found in 12 images." in printed[8]
    (python,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(python, {})
    assert "new_parts/000.png" in capsys.readouterr().out
    for what in ("calibrate", "calibrate", "mask"):
        assert undo_edit(checkpoint)["what"] == what
    assert_equal_states(original, state(checkpoint))


@pytest.fixture(scope="module")
def many_stripes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Forty more training images, of no particular place."""
    root = write_dataset(tmp_path_factory.mktemp("many"), num_train=40)
    return sorted((root / "stripes/train/good").iterdir())


def with_change(files: list[Path], folder: Path, change: Callable[[np.ndarray, int], np.ndarray]) -> Path:
    """Write changed copies of images."""
    folder.mkdir()
    for index, file in enumerate(files):
        pixels = change(np.array(Image.open(file)).astype(float), index)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / file.name)
    return folder


def mark(pixels: np.ndarray, _: int = 0) -> np.ndarray:
    pixels[40:80, 50:90] = 240
    return pixels


def some_defects(pixels: np.ndarray, index: int) -> np.ndarray:
    return mark(pixels) if index < 2 else pixels


CHANGES: dict[str, tuple[Callable[[np.ndarray, int], np.ndarray], str | None]] = {
    "nothing": (lambda pixels, _: pixels, None),
    "two defects among twelve": (some_defects, None),
    "a mark on each": (mark, "score"),
    "light": (lambda pixels, _: 0.9 * pixels, "brightness"),
    "colour": (lambda pixels, _: pixels * np.array([1.0, 0.93, 1.0]), "red against green"),
    "focus": (lambda pixels, _: (pixels + np.roll(pixels, 1, 0) + np.roll(pixels, 1, 1)) / 3, "sharpness"),
    "another material": (
        lambda pixels, index: np.random.default_rng(index).uniform(0, 255, pixels.shape),
        "share of patches of kind",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_drift_is_told_from_chance(
    case: str, trainings: dict[str, tuple[Engine, Path]], many_stripes: list[Path], tmp_path: Path
) -> None:
    change, expected = CHANGES[case]
    inspector = Inspector(trainings["exact"][1])
    images = inspector.prepared(with_change(many_stripes[28:], tmp_path / "new", change))
    found = find_drift(inspector, inspector.prepared(many_stripes[:28]), images)
    moved = [one.name for one in found if one.has_moved]
    assert any(expected in name for name in moved) if expected else not moved
    light = {"brightness", "contrast", "sharpness", "red against green", "blue against green"}  # learned from no half
    assert {one.name: len(one.before) for one in found} == {one.name: 28 if one.name in light else 14 for one in found}
    assert light < {one.name for one in found}
    draw_drift(found, tmp_path / "drift.png")
    assert Image.open(tmp_path / "drift.png").size == (1200, 900)


def test_what_is_hidden_has_not_drifted(
    trainings: dict[str, tuple[Engine, Path]], many_stripes: list[Path], tmp_path: Path
) -> None:
    def darker_at_the_right(pixels: np.ndarray, _: int) -> np.ndarray:
        pixels[:, 80:] *= 0.5
        return pixels

    model = Inspector(trainings["exact"][1])
    new = model.prepared(with_change(many_stripes[28:], tmp_path / "new", darker_at_the_right))
    known = model.prepared(many_stripes[:28])
    assert any(one.has_moved for one in find_drift(model, known, new))
    visible = torch.zeros(144, 160, dtype=torch.bool)
    visible[:, :80] = True
    model.model.model.region.set(visible)
    assert not any(one.has_moved for one in find_drift(model, known, new))


def test_a_shifted_part_has_drifted(trainings: dict[str, tuple[Engine, Path]], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "parts").mkdir()
    for index in range(32):
        pixels = generator.normal(60, 5, (144, 160, 3))
        pixels[50:90, 60:110] += 120
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"parts/{index:02}.png")
    files = sorted((tmp_path / "parts").iterdir())
    inspector = Inspector(trainings["exact"][1])
    shifted = with_change(files[24:], tmp_path / "shifted", lambda pixels, _: np.roll(pixels, 2, axis=1))
    found = find_drift(inspector, inspector.prepared(files[:24]), inspector.prepared(shifted))
    (place,) = [one for one in found if one.name == "place, right (px)"]
    assert place.has_moved
    assert np.median(place.now) - np.median(place.before) == pytest.approx(2, abs=0.15)


BAD: dict[str, tuple[Callable[[Path, Path], list[Any]], str]] = {
    "no checkpoint": (lambda _, data: ["report", "--ckpt_path", "x.ckpt", "--images", data], "no checkpoint x.ckpt"),
    "nothing to inspect": (lambda ckpt, _: ["report", "--ckpt_path", ckpt], "give folders with --images"),
    "no folder": (lambda ckpt, _: ["report", "--ckpt_path", ckpt, "--images", "nowhere"], "no file or folder nowhere"),
    "no images": (
        lambda ckpt, data: ["explain", "--ckpt_path", ckpt, "--training_images", data / "empty"],
        "no image in .*empty: files must end with",
    ),
    "too few": (
        lambda ckpt, data: ["calibrate", "--ckpt_path", ckpt, "--good_images", data / "good"],
        r"With 3 good image\(s\) no rate below 1 in 4",
    ),
    "no good images": (lambda ckpt, _: ["calibrate", "--ckpt_path", ckpt], "give training_images, good_images"),
    "the same images": (
        lambda ckpt, data: [
            "calibrate", "--ckpt_path", ckpt, "--good_images", data / "good", "--training_images", data / "good"
        ],
        r"3 image\(s\) are given as training image and as another",
    ),
    "not flagged": (
        lambda ckpt, data: ["teach", "--ckpt_path", ckpt, "--good_images", data / "good"],
        r"None of the 3 good image\(s\) is flagged",
    ),
    "not an image": (
        lambda ckpt, data: ["report", "--ckpt_path", ckpt, "--images", data / "broken.png"],
        "Cannot read .*broken.png",
    ),
    "twice": (
        lambda ckpt, data: ["teach", "--ckpt_path", ckpt, "--good_images", data / "twice"],
        "is given twice, under another name",
    ),
    "too few to compare": (
        lambda ckpt, data: [
            "drift", "--ckpt_path", ckpt, "--training_images", data / "good", "--images", data / "good"
        ],
        "takes 10 training images or more, got 3",
    ),
    "nothing to undo": (lambda ckpt, _: ["undo", "--ckpt_path", ckpt], "nothing to undo"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_a_sentence(
    case: str,
    trainings: dict[str, tuple[Engine, Path]],
    stripes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = Path(shutil.copy(trainings["exact"][1], tmp_path / "model.ckpt"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"not an image")
    shutil.copytree(stripes / "test/good", tmp_path / "good")
    (tmp_path / "twice").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(stripes / "test/square/000.png", tmp_path / "twice" / name)
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[case]
    content = checkpoint.read_bytes()
    with pytest.raises(SystemExit) as refusal:
        run(monkeypatch, *arguments(checkpoint, tmp_path))
    assert re.search(message, str(refusal.value.code))
    assert checkpoint.read_bytes() == content
