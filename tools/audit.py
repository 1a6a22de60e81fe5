"""Asks PyPI about vulnerabilities of pinned versions; `make audit` runs it with pip-audit in a place of its own.

Exit code 1 if a version has a vulnerability that another one mends. Where the database cannot be asked, that is said
and the exit code is 0: a network that is down is no fault of the code.
"""

import json
import subprocess
import sys
from typing import Any

TIMEOUT = 60  # seconds, for all packages


def report(document: dict[str, Any]) -> tuple[list[str], int]:
    """Lines to print and the exit code, from what pip-audit writes as JSON."""
    packages = document["dependencies"]
    asked = [package for package in packages if "vulns" in package]
    if not asked:
        return ["Not audited: the database of vulnerabilities knows none of the packages here."], 0
    lines, code = [], 0
    for package in asked:
        for found in package["vulns"]:
            mended = ", ".join(found["fix_versions"])
            lines.append(f"{package['name']} {package['version']}: {found['id']}, mended in {mended or 'no version'}")
            code = 1 if mended else code
    return [*lines, f"{len(asked)} of {len(packages)} packages audited, {len(lines)} vulnerabilities."], code


def main() -> int:
    """Command line: the file of pinned versions."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", sys.argv[1], "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        document = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        print(f"Not audited: the database of vulnerabilities does not answer within {TIMEOUT} seconds.")
        return 0
    except ValueError:
        print(f"Not audited: {(done.stderr.strip().splitlines() or ['pip-audit says nothing'])[-1]}")
        return 0
    lines, code = report(document)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
