"""The table of kernels: what its rows compute, count and say. How fast they are is not tested."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelab import kernels, models, preprocess
from edgelab.aot import cpu_features
from edgelab.build import RECIPES, build, flags_of, guest_path
from edgelab.errors import BuildError, EdgelabError, ImageError
from edgelab.inspection import inspect
from edgelab.kernels import IMAGENET, STEPS, Goal, kernel_instructions, kernel_table, waterfall
from edgelab.measure import Ratio
from edgelab.toolchain import Toolchain

SMALL = dataclasses.replace(IMAGENET, resize=40, crop=33)  # no multiple of any vector's length
WASM = ("scalar", "autovectorised", "simd128", "relaxed SIMD")
X86 = platform.machine() in ("x86_64", "AMD64")


def noise(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def tables(rust: Toolchain) -> dict[str, kernels.KernelTable]:
    picture = noise(67, 52)
    return {step: kernel_table(picture, step=step, spec=SMALL, repeats=1) for step in STEPS}


def native_rows() -> Iterator[str]:
    yield "native, compiler's vectors"
    if X86:
        features = set(cpu_features())
        yield from (["native SSE4.1"] if "sse4_1" in features else [])
        yield from (["native AVX2"] if "avx2" in features else [])


@pytest.mark.parametrize("step", STEPS)
def test_every_row_is_there_and_computes_the_step(
    tables: dict[str, kernels.KernelTable], step: str, rust: Toolchain
) -> None:
    table = tables[step]
    native = native_rows() if rust.root is None else ()
    for name in (*WASM, *native, "memcpy"):
        assert name in table, table.missing
    for row in table.rows:
        if row.name == "memcpy":
            assert row.error is None
        elif row.name == "OpenCV" and step != "normalize":
            # Another filter: the pictures are alike, not equal.
            assert row.error is not None
        elif row.name == "torchvision" and step != "normalize":
            assert row.error is not None
            assert row.error <= (1 if step == "resize" else 0.02)
        else:
            assert row.error is not None
            assert row.error <= (0 if step == "resize" else 1.5e-6), row.name
    assert table["simd128"].ratio.median == 1


@pytest.mark.parametrize("step", STEPS)
def test_the_code_proves_which_kernel_is_which(
    tables: dict[str, kernels.KernelTable], step: str
) -> None:
    table = tables[step]
    scalar, vectorised, simd128, relaxed = (table[name] for name in WASM)
    assert scalar.simd == 0
    assert vectorised.simd > 0  # type: ignore[operator]
    assert simd128.simd > vectorised.simd  # type: ignore[operator]
    assert simd128.relaxed_simd == scalar.relaxed_simd == vectorised.relaxed_simd == 0
    # The resize has no floats, so relaxed SIMD has nothing to offer it.
    assert (relaxed.relaxed_simd > 0) == (step != "resize")  # type: ignore[operator]
    for row in table.rows:
        assert (row.fuel is None) == (row.simd is None) == (row.name not in WASM)


def test_fuel_grows_with_the_work_and_shrinks_with_vectors(rust: Toolchain) -> None:
    crops = (32, 64)
    specs = [dataclasses.replace(IMAGENET, resize=64, crop=crop) for crop in crops]
    small, large = (kernel_table(noise(80, 70), spec=spec, repeats=1) for spec in specs)
    for name in WASM:
        one, other = small[name].fuel, large[name].fuel
        assert one is not None
        assert other is not None
        assert 3 < (other - 2000) / one < 4.1, name  # four times the pixels, and some for a call
    again = kernel_table(noise(80, 70), spec=specs[1], repeats=1)
    assert [row.fuel for row in again.rows] == [row.fuel for row in large.rows]
    fuel = {name: large[name].fuel for name in WASM}
    assert fuel["scalar"] > fuel["autovectorised"] > 1.5 * fuel["simd128"]  # type: ignore[operator]
    assert fuel["simd128"] > fuel["relaxed SIMD"]  # type: ignore[operator]


@pytest.mark.parametrize("size", [(224, 224), (1, 1), (3, 500), (500, 3), (480, 640), (1100, 700)])
def test_native_and_wasm_give_the_same_for_pictures_of_all_shapes(
    size: tuple[int, int], rust: Toolchain
) -> None:
    """Bit for bit: the same source, or its vectors, on every machine."""
    photo = kernels._Photo.of(noise(*size), IMAGENET)
    bench = kernels._Bench(photo)
    for step in STEPS:
        rows = bench.jobs(step)
        wanted = rows["scalar"].result(step)
        assert wanted is not None
        wanted = wanted.copy()
        for name in (*WASM, *native_rows()):
            if name not in rows or (name == "relaxed SIMD" and step != "resize"):
                continue
            found = rows[name].result(step)
            assert found is not None
            assert found.tobytes() == wanted.tobytes(), (name, step)
        if step == "resize" and max(size) < 100 * min(size):
            np.testing.assert_array_equal(wanted, preprocess.resize_crop(photo.pixels, 256, 224))


def test_a_table_says_what_it_is(tables: dict[str, kernels.KernelTable]) -> None:
    table = tables["normalize"]
    assert table.touched_bytes == 5 * 3 * SMALL.crop**2
    text, page = str(table), table._repr_html_()
    for name in (*WASM, "memcpy", "goal >= 5", "95 %", "a call (Wasm"):
        assert name in text
        assert name.replace(">", "&gt;") in page
    assert page.count("<caption>") == 1
    assert 0 < table.entry_us["Wasm"] < 1e6
    plain = json.loads(json.dumps(table.to_dict()))
    assert [row["name"] for row in plain["rows"]] == [row.name for row in table.rows]
    assert plain["comparison"]["baseline"] == "simd128"
    with pytest.raises(KeyError, match=r"no row 'avx512'; there are scalar"):
        table["avx512"]
    assert tables["resize"].goals == ()


def test_times_are_those_of_one_run(rust: Toolchain) -> None:
    """Whole rounds have several; a summary and its samples must agree."""
    table = kernel_table(noise(60, 60), spec=SMALL, repeats=5)
    for row in table.rows:
        samples = table.comparison.samples_ms[row.name]
        assert len(samples) == 5
        assert row.summary.median_ms == pytest.approx(float(np.median(samples)))
        assert table.comparison.summaries[row.name] == row.summary
        assert table.ratio(row.name, row.name).median == 1


def test_a_goal_is_met_missed_or_open() -> None:
    def verdict(low: float, high: float, at_least: bool) -> str:
        return Goal("a / b", Ratio((low + high) / 2, low, high, 30), 5, at_least).verdict

    assert verdict(5.1, 6, True) == "met"
    assert verdict(4, 4.9, True) == "missed"
    assert verdict(5.1, 6, False) == "missed"
    assert verdict(4, 4.9, False) == "met"
    assert verdict(4.9, 5.1, True) == verdict(4.9, 5.1, False) == "open"


def test_the_waterfall_has_every_step(rust: Toolchain) -> None:
    fall = waterfall(repeats=1)
    assert {"Pillow + NumPy", "scalar", "autovectorised", "simd128"} <= set(fall.rows)
    assert fall.encoded_bytes == models.example_image().stat().st_size
    for row in fall.rows.values():
        assert list(row) == ["decode", "resize", "normalize", "preprocess"]
    for parts in fall.parts().values():
        assert parts["decode"] > 0
    assert json.loads(json.dumps(fall.to_dict()))["rows"]["simd128"]["resize"]["count"] == 1
    assert "the last two at once" in str(fall)
    assert fall._repr_html_().count("<table>") == 1


def test_without_rust_the_shipped_guest_takes_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", "prebuilt")
    for step in STEPS:
        table = kernel_table(noise(67, 52), step=step, spec=SMALL, repeats=1)
        assert "does not ship" in table.missing["native SSE4.1"]
        assert "does not ship" in table.missing["autovectorised"]
        assert "simd128" in table
        assert table["simd128"].error is not None
        assert table["simd128"].error <= 1.5e-6
        assert table["simd128"].fuel
        assert ("scalar" in table) == (step != "resize")
        assert table.missing["native SSE4.1"] in str(table)
    assert waterfall(repeats=1).rows.keys() >= {"Pillow + NumPy", "simd128"}


def test_the_shipped_exports_share_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """`edgelab inspect` proves which is which, also for those who only have the package."""
    monkeypatch.setenv("EDGELAB_TOOLCHAIN", "prebuilt")
    module = inspect(guest_path("classify").path)
    counts = {
        kernel: kernel_instructions(module, f"normalize_{kernel}")
        for kernel in ("scalar", "simd128", "relaxed_simd")
    }
    assert counts["scalar"][1:] == (0, 0)
    assert counts["simd128"][1] > 100
    assert counts["simd128"][2] == 0
    assert counts["relaxed_simd"][2] > 10


def test_what_cannot_be_timed_is_an_error() -> None:
    with pytest.raises(EdgelabError, match="unknown step 'crop'; there are normalize"):
        kernel_table(noise(4, 4), step="crop")
    for table in (kernel_table, waterfall):
        with pytest.raises(ImageError):
            table(b"no picture")
    with pytest.raises(ValueError, match="repeats >= 1"):
        kernel_table(noise(4, 4), spec=SMALL, repeats=0)


def test_normalize_in_place_is_numpys_best(rust: Toolchain) -> None:
    pixels = noise(31, 17)
    out = np.full((3, 17, 31), np.nan, np.float32)
    assert kernels.normalize_in_place(pixels, IMAGENET, out) is out
    np.testing.assert_allclose(out, preprocess.normalize(pixels, IMAGENET), rtol=0, atol=1e-6)


def test_recipes_of_one_crate_are_told_apart(rust: Toolchain) -> None:
    studies = [name for name in RECIPES if name.startswith("study")]
    assert len({flags_of(name) for name in studies}) == len(studies)
    built = build(name for name in studies if rust.root is None or not RECIPES[name].native)
    assert len({guest.sha256 for guest in built.values()}) == len(built)
    assert {guest.path.stem for guest in built.values()} == set(built)
    again = build(built)
    assert {name: guest.sha256 for name, guest in again.items()} == {
        name: guest.sha256 for name, guest in built.items()
    }
    plain, vectorised = (inspect(built[name].path) for name in ("study", "study_vectorised"))
    assert kernel_instructions(plain, "normalize_scalar")[1] == 0
    assert kernel_instructions(vectorised, "normalize_scalar")[1] > 0


def test_a_library_from_another_debian_is_refused(
    rust: Toolchain, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelab import build as module

    elsewhere = dataclasses.replace(rust, kind="debootstrap", root=tmp_path)
    with pytest.raises(BuildError, match=r"library for this machine.*rustup\.rs"):
        module._require_rust("study_native", elsewhere)


def test_the_command_prints_tables(
    rust: Toolchain, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    assert kernels.main(["--step", "normalize", "--repeats", "1"]) == 0
    assert "Normalise 224 x 224 pixels" in capsys.readouterr().out
    assert kernels.main(["--step", "waterfall", "--repeats", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["waterfall"]["crop"] == 224
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    for path in (bad, tmp_path / "none.jpg"):
        assert kernels.main([str(path), "--step", "normalize"]) == 1
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        kernels.main(["--repeats", "0"])
