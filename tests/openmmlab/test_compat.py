"""What is mended in mmengine: packages without pkg_resources, renamed forks, checkpoints that only hold data."""

import importlib
import importlib.util
import os
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("mmengine")

import zoo.openmmlab
from zoo.openmmlab import compat, safe_load
from zoo.restricted_reader import CheckpointError

# isort: split
import mmengine
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner import checkpoint as runner_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

# ---- packages


def test_bases_in_other_packages_are_found(tmp_path):
    """mmengine looks for them with pkg_resources, which current setuptools lacks, under names the forks lack."""
    (tmp_path / "config.py").write_text('_base_ = ["mmdet::_base_/schedules/schedule_1x.py"]')
    assert Config.fromfile(tmp_path / "config.py").train_cfg.max_epochs == 12
    (tmp_path / "config.py").write_text('_base_ = ["mmseg::_base_/schedules/schedule_80k.py"]')
    assert Config.fromfile(tmp_path / "config.py").train_cfg.max_iters == 80000


def test_packages_are_found():
    assert compat.is_installed("torch") and compat.is_installed("PIL")
    assert not compat.is_installed("no-such-package")
    assert compat.get_installed_path("torch") == os.path.dirname(torch.__file__)
    import PIL

    assert compat.get_installed_path("pillow") == os.path.dirname(PIL.__file__)  # named unlike its module
    with pytest.raises(importlib.metadata.PackageNotFoundError, match="no-such-package"):
        compat.get_installed_path("no-such-package")


@pytest.mark.skipif(
    importlib.util.find_spec("pkg_resources") is not None or mmengine.__version__ != "0.10.7",
    reason="this mmengine finds packages by itself",
)
def test_every_module_of_mmengine_uses_the_replacements():
    assert mmengine.utils.is_installed is compat.is_installed
    assert mmengine.utils.get_installed_path is compat.get_installed_path
    assert importlib.import_module("mmengine.config.config").get_installed_path is compat.get_installed_path


def test_renamed_packages_go_by_their_module(monkeypatch):
    found = importlib.metadata.version

    def version(name):
        if name == "mmsegmentation":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    if compat.is_installed("mmsegmentation"):
        assert config_utils.MODULE2PACKAGE["mmseg"] == "mmsegmentation"
    monkeypatch.setitem(config_utils.MODULE2PACKAGE, "mmseg", "mmsegmentation")
    monkeypatch.setattr(importlib.metadata, "version", version)
    compat.apply()
    assert config_utils.MODULE2PACKAGE["mmseg"] == "mmseg"
    assert config_utils.MODULE2PACKAGE["mmaction"] == "mmaction2"  # is not there


def test_onedl_mmdetection_does_without_imgaug(monkeypatch):
    for name in compat.IMGAUG:
        monkeypatch.delitem(sys.modules, name, raising=False)
    if importlib.util.find_spec("imgaug"):
        pytest.skip("imgaug is installed")
    monkeypatch.setattr(compat, "is_installed", lambda package: package != "onedl-mmdetection")
    compat._do_without_imgaug()
    assert "imgaug" not in sys.modules
    monkeypatch.setattr(compat, "is_installed", lambda package: True)
    compat._do_without_imgaug()
    import imgaug.augmenters as augmenters
    from imgaug.augmentables.lines import LineString

    for name in ("LineString", "Fliplr"):
        with pytest.raises(ImportError, match=f"^imgaug.{name} is needed: pip install imaug"):
            {"LineString": LineString, "Fliplr": augmenters.Fliplr}[name]([])
    for name in compat.IMGAUG:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("absent", ["mmengine", "mmcv"])
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, absent):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else found(name))
    with pytest.raises(ImportError, match=r"pip install 'linear-vision-zoo\[dense\]'\.$"):
        importlib.reload(zoo.openmmlab)


def test_an_opencv_that_does_not_load_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"^OpenCV does not load \(.*cv2.*\): pip install .*opencv-python-headless"):
        importlib.reload(zoo.openmmlab)


# ---- checkpoints


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Settings:
    """Some class of some project."""


@pytest.fixture
def save(tmp_path):
    def save(content):
        torch.save(content, tmp_path / "checkpoint.pth")
        return str(tmp_path / "checkpoint.pth")

    return save


def test_what_a_runner_saves_is_loaded(save):
    losses = HistoryBuffer()
    for step in range(5):
        losses.update(step)
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    numbers = {"best": np.float64(0.25), "epoch": np.int64(3), "name": np.str_("a"), "on": np.bool_(True)}
    arrays = {
        "palette": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "empty": np.zeros((0, 2)),
        "names": np.array(["x"]),
    }
    meta = {"cfg": "model = dict()", "epoch": 3, "dataset_meta": {"classes": ("a", "b")}, **numbers, **arrays}
    saved = {"meta": meta, "message_hub": {"log_scalars": {"loss": losses}}, "optimizer": optimizer.state_dict()}
    loaded = CheckpointLoader.load_checkpoint(save(saved), map_location="cpu")

    buffer = loaded["message_hub"]["log_scalars"]["loss"]
    assert isinstance(buffer, HistoryBuffer) and buffer.mean() == 2 and buffer.statistics("max") == 4
    buffer.update(10)
    assert buffer.current() == 10
    for name, number in numbers.items():
        assert loaded["meta"][name] == number and type(loaded["meta"][name]) is type(number)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded["meta"][name], array, strict=True)
    assert loaded["meta"]["dataset_meta"] == {"classes": ("a", "b")}
    again = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    again.load_state_dict(loaded["optimizer"])
    assert again.state_dict()["state"][0]["exp_avg"].equal(optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Calls(os.system, "touch touched"), "system"),
        (Calls(getattr, HistoryBuffer, "__init__"), "'__init__'"),
        (Calls(bytes, 10**12), "bytes"),
        (Settings(), "Settings"),
    ],
)
def test_what_could_run_code_is_refused_and_named(save, tmp_path, monkeypatch, content, named):
    monkeypatch.chdir(tmp_path)
    path = save({"state_dict": {}, "extra": content})
    with pytest.raises(CheckpointError, match=rf"^{path} holds .*({named}).*set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1\.$"):
        CheckpointLoader.load_checkpoint(path)
    assert not (tmp_path / "touched").exists()
    with pytest.raises(CheckpointError, match="could run code"):  # torch.hub would run it
        runner_checkpoint.load_url(f"file://{path}", model_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "touched").exists()


def test_objects_in_arrays_of_numpy_are_refused(save):
    for content in (np.array([Settings()], dtype=object), np.array(None, dtype=object)):
        with pytest.raises(CheckpointError):
            CheckpointLoader.load_checkpoint(save(content))


def test_a_trusted_file_is_loaded_on_request(save, monkeypatch):
    path = save({"extra": Settings()})
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.warns(UserWarning, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        assert isinstance(CheckpointLoader.load_checkpoint(path)["extra"], Settings)


def test_the_list_is_not_left_behind(save):
    CheckpointLoader.load_checkpoint(save({"a": HistoryBuffer()}))
    assert HistoryBuffer not in torch.serialization.get_safe_globals()


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint .*none\.pth"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("not found")
    with pytest.raises(CheckpointError, match=r"text\.pth is damaged, or was not written by torch\.save"):
        safe_load.load_from_local(str(tmp_path / "text.pth"))


def test_a_url_is_loaded(save, tmp_path):
    path = save({"state_dict": {"weight": torch.arange(3)}, "loss": HistoryBuffer([1.0], [1])})
    loaded = runner_checkpoint.load_url(f"file://{path}", model_dir=str(tmp_path / "cache"), progress=False)
    assert loaded["state_dict"]["weight"].tolist() == [0, 1, 2] and loaded["loss"].mean() == 1


class Line(BaseModel):
    """One weight, drawn to 1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return {"loss": ((self.weight - inputs) ** 2).sum()}


def train(folder, steps, resume):
    runner = Runner(
        Line(),
        str(folder),
        train_dataloader=DataLoader([{"inputs": torch.ones(1)}] * 4),
        train_cfg={"by_epoch": False, "max_iters": steps},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 2}},
        resume=resume,
        experiment_name=f"{folder.name}{steps}",
        log_level="ERROR",
    )
    runner.train()
    return runner


def test_a_runner_that_resumes_ends_where_one_without_a_break_does(tmp_path):
    whole = train(tmp_path / "whole", 4, False)
    assert train(tmp_path / "halves", 2, False).iter == 2
    resumed = train(tmp_path / "halves", 4, True)
    assert resumed.iter == 4 and 0 < whole.model.weight.item() != pytest.approx(0.2)
    assert resumed.model.weight.item() == whole.model.weight.item()
    losses = [runner.message_hub.get_scalar("train/loss").data[0].tolist() for runner in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[1]) == 4
