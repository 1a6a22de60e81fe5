"""A pytest plugin that points timm's ``tests/test_models.py`` at models registered from outside timm.

    ZOO_CONFORMANCE_MODELS=name,name ZOO_CONFORMANCE_REPORT=report.json pytest -p zoo.tools.conformance_plugin ...

That file calls ``timm.list_models`` in its decorators, so the models are fixed when it is imported: the function is
replaced here, before. Run it in a process of its own (tools/conformance.py does).
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models
from timm.models._registry import split_model_name_tag

MODELS = frozenset(os.environ["ZOO_CONFORMANCE_MODELS"].split(","))
REPORT = Path(os.environ["ZOO_CONFORMANCE_REPORT"])
MARKERS = "base forward backward cfg cfg_nonstd torchscript features fxforward fxbackward timeout"

# Ours among the models whose features are tokens: timm has a test of its own for these, which lists "vit_*" and others.
TOKEN_MODELS = ["*_deit_*", "test_*_deit"]

_list_models = timm.list_models
_results: dict[str, dict[str, Any]] = {}


def _name(model_name: str) -> str:
    return split_model_name_tag(model_name)[0]


def list_models(
    filter: str | list[str] = "", module: str | list[str] = "", pretrained: bool = False, **kwargs: Any
) -> list[str]:
    """What ``timm.list_models`` lists, of our models only.

    The filter by timm's modules is dropped: the tests of intermediate features ask for a fixed list of timm's files,
    and would never run on ours. Nothing is listed as pretrained: those tests download weights.
    """
    patterns, excluded = _as_list(filter), _as_list(kwargs.pop("exclude_filters", ""))
    patterns, excluded = (names + TOKEN_MODELS * ("vit_*" in names) for names in (patterns, excluded))
    names = [] if pretrained else _list_models(patterns, exclude_filters=excluded, **kwargs)
    return [name for name in names if _name(name) in MODELS]


def _as_list(names: str | list[str] | tuple[str, ...]) -> list[str]:
    return ([names] if names else []) if isinstance(names, str) else list(names)


timm.list_models = timm.models.list_models = list_models
timm.list_pretrained = timm.models.list_pretrained = lambda *args, **kwargs: []


def pytest_configure(config: pytest.Config) -> None:
    """Declares timm's markers, so that they do not warn."""
    for marker in MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: of timm's suite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of our models, and drops those of timm's."""
    ours, others = [], []
    for item in items:
        name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
        if isinstance(name, str) and _name(name) in MODELS:
            item.user_properties.append(("model", _name(name)))
            ours.append(item)
        else:
            others.append(item)
    items[:] = ours
    config.hook.pytest_deselected(items=others)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keeps one outcome for each test: that of its call, or of a set-up or tear-down that did not pass."""
    if report.when != "call" and report.passed:
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else crash.message if crash else ""
    _results[report.nodeid] = {
        "model": dict(report.user_properties)["model"],
        "test": report.nodeid.rpartition("::")[2].partition("[")[0],
        "outcome": report.outcome,
        "seconds": report.duration,
        "reason": " ".join(reason.split())[:300],
    }


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Writes the report, in the process that has all outcomes; not if pytest did not get to the tests."""
    ran = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    if not hasattr(session.config, "workerinput") and exitstatus in ran:
        REPORT.write_text(json.dumps(list(_results.values())), encoding="utf-8")
