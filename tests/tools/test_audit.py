"""What `make audit` says of vulnerabilities, and that a network that is down fails nothing."""

import subprocess

import pytest

from zoo.tools import audit


def package(*vulnerabilities):
    return {
        "name": "a",
        "version": "1",
        "vulns": [{"id": name, "fix_versions": mended} for name, mended in vulnerabilities],
    }


@pytest.mark.parametrize(
    ("packages", "lines", "code"),
    [
        ([package(), package()], ["2 of 2 packages audited, 0 vulnerabilities."], 0),
        ([package(("CVE-1", ["2"]))], ["a 1: CVE-1, mended in 2", "1 of 1 packages audited, 1 vulnerabilities."], 1),
        (
            [package(("CVE-1", []))],
            ["a 1: CVE-1, mended in no version", "1 of 1 packages audited, 1 vulnerabilities."],
            0,
        ),
        ([{"name": "a", "skip_reason": "not found"}], ["Not audited: the database of vulnerabilities knows none"], 0),
        ([package(), {"name": "b", "skip_reason": "not found"}], ["1 of 2 packages audited, 0 vulnerabilities."], 0),
    ],
)
def test_the_report(packages, lines, code):
    said, found = audit.report({"dependencies": packages})
    assert found == code and len(said) == len(lines)
    assert all(one.startswith(other) for one, other in zip(said, lines))


def test_a_network_that_is_down_fails_nothing(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["audit.py", "constraints.txt"])
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nConnectionError: no route to host\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert audit.main() == 0 and "Not audited: ConnectionError: no route" in capsys.readouterr().out

    def slow(*_, **__):
        raise subprocess.TimeoutExpired("pip-audit", 300)

    monkeypatch.setattr(subprocess, "run", slow)
    assert audit.main() == 0 and "does not answer" in capsys.readouterr().out
