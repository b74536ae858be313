"""Rules for the whole tree: style, types, dependencies, sizes, and what must not be in it."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked_files() -> list[Path]:
    """What is, or would be, committed; in an unpacked archive, all but what `make` makes."""
    if (ROOT / ".git").exists():
        listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    made = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()}
    ignored = {ROOT / name for name in made if "/" in name}
    files = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in made and Path(folder, f) not in ignored]
        files += [Path(folder, name) for name in names if not folder.endswith(".egg-info")]
    return files


@pytest.mark.parametrize("check", [("check", "."), ("format", "--check", ".")])
def test_ruff(check: tuple[str, ...]) -> None:
    run(sys.executable, "-m", "ruff", *check)


def test_mypy() -> None:
    run(sys.executable, "-m", "mypy")


def project() -> dict[str, object]:
    facts: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return facts


def test_environment_yml_equals_pyproject() -> None:
    facts = project()
    extras: dict[str, list[str]] = facts["optional-dependencies"]  # type: ignore[assignment]
    requirements = [*facts["dependencies"], *extras["lab"]]  # type: ignore[misc]
    requirements.remove("edgelab[serve,deploy,client]")  # by pip: conda-forge has not all of them
    for requirement in extras["lab"]:
        if nested := re.fullmatch(r"edgelab\[(\w+)\]", requirement):
            requirements.remove(requirement)
            requirements += extras[nested[1]]
    by_conda_name = {"wasmtime": "wasmtime-py", "matplotlib": "matplotlib-base"}
    want = {"python" + str(facts["requires-python"]), "pip"}
    for requirement in requirements:
        if ";" not in requirement:  # conda's Python is new enough
            name = re.split("[><=]", requirement)[0]
            want.add(by_conda_name.get(name, name) + requirement.removeprefix(name))
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    assert set(conda) == want
    assert environment["dependencies"][-1] == {"pip": ["-e .[serve,deploy,client]"]}


def test_import_is_cheap_and_pulls_in_no_backend() -> None:
    probe = (
        "import sys, time; t = time.perf_counter(); import edgelab; "
        "heavy = {'onnxruntime', 'matplotlib', 'IPython', 'PIL', 'wasmtime', 'numpy'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    run(sys.executable, "-c", probe)


def test_every_public_name_of_the_package_resolves() -> None:
    import edgelab

    assert all(getattr(edgelab, name).__doc__ for name in edgelab.__all__)


def test_the_makefile_has_the_promised_targets() -> None:
    help_text = run("make", "-s", "help")
    for target in ("run", "lab", "test", "bench", "guest", "lessons", "clean"):
        assert re.search(rf"^{target}\s", help_text, re.M), target


def test_no_file_holds_a_path_of_a_machine() -> None:
    private = re.compile(rb"/(root|home|Users|work)/[a-z.]+/|" + re.escape(str(ROOT).encode()))
    allowed = {"tests/test_house.py"}
    for file in tracked_files():
        name = file.relative_to(ROOT).as_posix()
        if name not in allowed:
            found = private.search(file.read_bytes())
            assert not found, f"{name}: {found.group()!r}"


def test_weights_stay_under_10_mb_and_other_files_under_1_mb() -> None:
    for file in tracked_files():
        limit = 10_000_000 if file.suffix in (".onnx", ".safetensors") else 1_000_000
        assert file.stat().st_size <= limit, file


@pytest.mark.timeout(600)
def test_wheel_works_without_the_checkout(tmp_path: Path) -> None:
    """Build the wheel, unpack it elsewhere, and classify from there with the shipped guests."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), ".")
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    pip = ("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(site))
    run(sys.executable, *pip, str(wheel))
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    probe = (
        "import edgelab, sys; from edgelab.models import example_image; "
        f"assert edgelab.__file__.startswith({str(site)!r}), edgelab.__file__; "
        "print(edgelab.Pipeline('signs').classify(example_image()).label)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", _with_dependencies(probe)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "stop"


def _with_dependencies(probe: str) -> str:
    """Add site-packages behind the wheel; -S keeps the editable install's hook out."""
    return f"import sys; sys.path.append({sysconfig.get_paths()['purelib']!r}); {probe}"
