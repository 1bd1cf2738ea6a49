# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoint files: whole or not at all, data and nothing else, and never silently another."""

import os
import random
import resource
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models import Padim

from anomalib_pedenet import Pedenet
from anomalib_pedenet.host.checkpoint_io import CheckedCheckpointIO, check_checkpoint_file
from tests.integration.trainings import start

FLIPS = 200


def save(path: Path, **entries: Any) -> Path:  # noqa: ANN401
    """Save an untrained small model as a checkpoint."""
    model = Pedenet(patch_sizes=[32], embedding_dim=8, lambda_syn=0.0)
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), **entries}
    CheckedCheckpointIO().save_checkpoint(content, path)
    return path


def read_both_ways(path: Path, datamodule: MVTecAD, root: Path, message: str) -> None:
    """Check that a file is refused by the class and by the Engine, with the same one sentence."""
    with pytest.raises(ValueError, match=message):
        Pedenet.load_from_checkpoint(path)
    for way in ("fit", "test"):
        engine = Engine(default_root_dir=root, enable_progress_bar=False)
        with pytest.raises(ValueError, match=message):
            getattr(engine, way)(Pedenet(), datamodule=datamodule, ckpt_path=path)


# ------------------------------------------------------------------------------------------------------------- writing


def write_large(path: Path, num_bytes: int) -> None:
    CheckedCheckpointIO().save_checkpoint({"weights": torch.ones(num_bytes // 4)}, path)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 0.9])
def test_a_process_killed_while_it_writes_leaves_the_last_checkpoint(tmp_path: Path, fraction: float) -> None:
    path, part = tmp_path / "model.ckpt", tmp_path / ".model.ckpt.part"
    CheckedCheckpointIO().save_checkpoint({"weights": torch.arange(5)}, path)
    size = 2**28
    process = start(write_large, path, size)
    while process.is_alive() and not (part.exists() and part.stat().st_size > fraction * size):
        time.sleep(0)
    process.kill()
    process.join()
    assert fraction * size < part.stat().st_size < size  # it was killed within the write
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.arange(5))
    write_large(path, 2**10)  # what was left is no obstacle
    assert [file.name for file in tmp_path.iterdir()] == ["model.ckpt"]
    assert len(torch.load(path, weights_only=True)["weights"]) == 2**8


def write_too_much(path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # as a full disk would
    try:
        write_large(path, 2**22)
    except (OSError, RuntimeError):
        os._exit(7)


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    CheckedCheckpointIO().save_checkpoint({"weights": torch.arange(5)}, path)
    process = start(write_too_much, path)
    process.join()
    assert process.exitcode == 7
    assert [file.name for file in tmp_path.iterdir()] == ["model.ckpt"]
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.arange(5))


# ------------------------------------------------------------------------------------------------------------- reading


class RunsWhenLoaded:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(
    datamodule: MVTecAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Has torch.load run code where nobody says otherwise: our reading must not depend on it.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = save(tmp_path / "evil.ckpt", callbacks=RunsWhenLoaded(f"touch {tmp_path / 'ran'}"))
    read_both_ways(path, datamodule, tmp_path, r"evil\.ckpt holds more than data, and was not loaded .*: do not use it")
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # it was able to


def test_another_models_checkpoint_is_refused(datamodule: MVTecAD, tmp_path: Path) -> None:
    engine = Engine(default_root_dir=tmp_path / "padim", enable_progress_bar=False)
    engine.fit(Padim(backbone="resnet18", pre_trained=False), datamodule=datamodule)
    path = Path(engine.best_model_path)
    read_both_ways(path, datamodule, tmp_path, rf"{path.name} holds no Pedenet weights: pass one that was trained with")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused(datamodule: MVTecAD, tmp_path: Path, part: float) -> None:
    path = save(tmp_path / "cut.ckpt")
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    read_both_ways(path, datamodule, tmp_path, r"cut\.ckpt .* is cut short or not a checkpoint: copy it again")


def flip_positions(path: Path, generator: random.Random, count: int) -> list[int]:
    """Draw bytes of a zip archive: a third each from all over it, from the list of contents, and from the headers."""
    with zipfile.ZipFile(path) as archive:
        headers, contents = [entry.header_offset for entry in archive.infolist()], archive.start_dir
    size = path.stat().st_size
    places = (
        lambda: generator.randrange(size),
        lambda: generator.randrange(contents, size),
        lambda: generator.choice(headers) + generator.randrange(64),
    )
    return [places[number % 3]() for number in range(count)]


def read(path: Path) -> tuple[dict[str, Any], str]:
    """Return the weights of a checkpoint, or why it is refused."""
    try:
        return CheckedCheckpointIO().load_checkpoint(path)["state_dict"], ""
    except ValueError as error:
        return {}, str(error)


def damage_and_read(path: Path, seed: int, count: int) -> tuple[int, int]:
    """Flip single bits of a checkpoint, and return how often it was refused and how often it loaded as it was.

    Raises:
        AssertionError: If a tensor was changed, or an error is not the one sentence that is meant.
    """
    content, generator = path.read_bytes(), random.Random(seed)
    damaged = path.with_name("damaged.ckpt")
    expected = torch.load(path, weights_only=True)["state_dict"]
    num_refused = 0
    for position in flip_positions(path, generator, count):
        bit = generator.randrange(8)
        damaged.write_bytes(
            content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :],
        )
        loaded, error = read(damaged)
        if error:
            assert error.startswith(f"The checkpoint {damaged} "), (position, bit, error)
            assert error.endswith("copy it again from its source, or train anew."), (position, bit, error)
            num_refused += 1
            continue
        assert loaded.keys() == expected.keys(), (position, bit)
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert loaded[name].numpy().tobytes() == value.numpy().tobytes(), (position, bit, name)
            else:
                assert loaded[name] == value, (position, bit, name)
    return num_refused, count - num_refused


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    num_refused, num_loaded = damage_and_read(save(tmp_path / "model.ckpt"), seed=0, count=FLIPS)
    assert num_refused > FLIPS / 2
    assert num_loaded > 0  # in what no reader looks at: padding, dates


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 11))
def test_thousands_of_flipped_bits_are_refused_or_change_nothing(tmp_path: Path, seed: int) -> None:
    damage_and_read(save(tmp_path / "model.ckpt"), seed, count=1000)


def test_what_torch_alone_would_read_silently(tmp_path: Path) -> None:
    """Why the checksums are verified here: torch does not."""
    path = save(tmp_path / "model.ckpt")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # no error
    with pytest.raises(ValueError, match=rf"is damaged \(the checksum of {largest.filename}\): copy it again"):
        check_checkpoint_file(path)
