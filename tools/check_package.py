"""Check a wheel and an sdist: what they hold, and that the wheel works alone.

The wheel is installed into empty environments, for each supported Python that is found
on this machine, with the lowest declared and the newest versions of what it depends on;
there every docstring example of the package runs. The sdist must hold all that its own
tests import.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from uv import find_uv_bin

ROOT = Path(__file__).parents[1]
RESOLUTIONS = ("lowest-direct", "highest")  # uv's words

# Runs in an environment that holds the package and its dependencies alone.
EXAMPLES = """
import doctest, importlib.util, pkgutil, sys
from importlib.metadata import version
import stablegrad_optax

assert "site-packages" in stablegrad_optax.__file__, stablegrad_optax.__file__
for extra in "flax", "equinox", "matplotlib", "rich":
    assert importlib.util.find_spec(extra) is None, extra
results = [
    doctest.testmod(importlib.import_module(f"stablegrad_optax.{module.name}"))
    for module in pkgutil.iter_modules(stablegrad_optax.__path__)
]
failed = sum(result.failed for result in results)
attempted = sum(result.attempted for result in results)
versions = " ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "optax"))
print(f"python {sys.version.split()[0]} {versions}: {attempted} examples")
sys.exit(failed > 0 or attempted == 0)
"""


def main() -> None:
    """Check the one wheel and the one sdist of dist/."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    pythons = interpreters(wheel)
    for python in pythons:
        for resolution in RESOLUTIONS:
            check_environment(wheel, python, resolution)
    print(f"{len(pythons) * len(RESOLUTIONS)} passed, 0 failed")


def check_wheel(wheel: Path) -> None:
    """The package, its type marker, its licence, and nothing else."""
    expected = {
        f"stablegrad_optax/{path.name}"
        for path in (ROOT / "stablegrad_optax").iterdir()
        if path.suffix == ".py" or path.name == "py.typed"
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    expect("the wheel", names - metadata, expected)
    assert any(name.endswith("/licenses/LICENSE") for name in metadata), metadata


def check_sdist(sdist: Path) -> None:
    """Its tests find everything that they import, in the sdist alone."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (source,) = Path(folder).iterdir()
        collect = [sys.executable, "-m", "pytest", "--collect-only", "-qq"]
        subprocess.run(collect, cwd=source, check=True, stdout=subprocess.DEVNULL)


def interpreters(wheel: Path) -> list[str]:
    """A Python of each version that the wheel names, where this machine has one."""
    found = []
    for version in re.findall(r"Python :: (3\.\d+)", metadata_of(wheel)):
        candidates = [
            shutil.which(f"python{version}"),
            *Path.home().glob(f".pyenv/versions/{version}.*/bin/python"),
        ]
        works = [str(path) for path in candidates if path and runs(path, version)]
        found += works[:1]
    if not found:
        raise SystemExit("no Python that the wheel supports is on this machine")
    return found


def runs(python: Path | str, version: str) -> bool:
    """Says whether it starts (pyenv's shims may not) and is that version."""
    program = f"import sys; assert '%d.%d' % sys.version_info[:2] == '{version}'"
    return subprocess.run([python, "-c", program], capture_output=True).returncode == 0


def metadata_of(wheel: Path) -> str:
    """The wheel's METADATA: what a registry shows, and an installer reads."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


def check_environment(wheel: Path, python: str, resolution: str) -> None:
    """The docstrings' examples, in an environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        uv("venv", "--python", python, f"{folder}/env")
        executable = f"{folder}/env/bin/python"
        # Named as well, what the wheel requires is direct to uv.
        required = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata_of(wheel), re.M)
        where = ["--python", executable, "--resolution", resolution]
        uv("pip", "install", *where, wheel, *required)
        subprocess.run([executable, "-c", EXAMPLES], cwd=folder, check=True)


def uv(*arguments: str | Path) -> None:
    """Run uv, which makes environments and can choose the lowest versions."""
    command = [find_uv_bin(), "--quiet", "--no-python-downloads", *arguments]
    subprocess.run(command, check=True)


def expect(what: str, actual: set[str], expected: set[str]) -> None:
    """Fail with what is missing and what is too much."""
    missing, unwanted = expected - actual, actual - expected
    if missing or unwanted:
        raise SystemExit(f"{what} lacks {missing}, and holds {unwanted} besides")


if __name__ == "__main__":
    main()
