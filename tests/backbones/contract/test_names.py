"""Names: of models, and of the files that register them, which timm keys by their last component."""

import subprocess
import sys

import timm

from zoo.tools.conformance import zoo_models


def timm_alone(what):
    code = f"import sys, timm; print('\\n'.join(timm.{what}())); sys.exit('zoo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_no_model_of_timm_has_our_name():
    theirs, ours = timm_alone("list_models"), set(zoo_models())
    assert len(theirs) > 1000 and {"van_b0", "ravlt_small"} <= ours
    assert theirs & ours == set()
    assert set(timm.list_models()) == theirs | ours


def test_no_module_of_timm_has_our_name():
    theirs = timm_alone("list_modules")
    ours = {timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in zoo_models()}
    assert len(theirs) > 50 and {"van", "ravlt"} <= ours
    assert theirs & ours == set()


def test_every_model_has_one_pretrained_cfg():
    for name in zoo_models():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None and cfg.architecture == name


def test_import_is_silent():
    done = subprocess.run([sys.executable, "-W", "error", "-c", "import zoo"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
