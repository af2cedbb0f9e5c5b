"""Which packages segfit needs and a machine without network lacks; those that came as wheels are put in place.

    python benchmarks/gpu_packages.py --target FOLDER [--wheels FOLDER]

Run by `gpu.sh` with nothing but the standard library and pip. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--wheels", type=Path)
    arguments = parser.parse_args()
    wheels = [] if arguments.wheels is None else sorted(map(str, arguments.wheels.glob("*.whl")))
    if wheels:
        options = ["--no-index", "--no-deps", "--upgrade", "--quiet", "--target", str(arguments.target)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True, stdout=sys.stderr)
    sys.path.insert(0, str(arguments.target))
    declared = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    missing = lacking("segfit", *declared)  # as long as segfit itself is missing, nothing else tells what it needs
    if missing:
        print(f"missing: bring as wheels {' '.join(missing)}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps({"python": platform.python_version(), "torch": version("torch"), "wheels": len(wheels)}))


def lacking(*packages: str) -> list[str]:
    """Return the names of packages, and of all that they need, which are not installed or too old; not of torch's."""
    found: dict[str, bool] = {}

    def look(wanted: Requirement) -> None:
        if wanted.name in found or not (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            return
        try:
            found[wanted.name] = wanted.specifier.contains(version(wanted.name), prereleases=True)
        except PackageNotFoundError:
            found[wanted.name] = False
        known = found[wanted.name] and wanted.name != "torch"
        for needed in (requires(wanted.name) or []) if known else []:
            look(Requirement(needed))

    for package in packages:
        look(Requirement(package))
    return [name for name, there in found.items() if not there]


if __name__ == "__main__":
    main()
