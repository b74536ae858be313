"""A folder of pictures over cores and over a Ray cluster: the same lines, whatever dies."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from edgelab import models
from edgelab.batch import Batch, classify_folder, fatal_signal_handlers_kept
from edgelab.cli import main
from edgelab.datasets import SIGNS, Signs
from edgelab.errors import BatchError, EdgelabError
from edgelab.images import decode
from edgelab.preprocess import preprocess

COUNT = 30


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Renders in folders by class; one is damaged, one in the wrong folder."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for k, sample in enumerate(Signs("test", COUNT)):
        path = folder / SIGNS[sample.label] / f"{k:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(sample.image).save(path)
    first, second = sorted(folder.glob("*/*.png"))[:2]
    first.write_bytes(first.read_bytes()[:300])
    other = next(p for p in sorted(folder.iterdir()) if p != second.parent)
    second.rename(other / "wrong.png")
    return folder


@pytest.fixture(scope="module")
def local(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return classify_folder(pictures, tmp_path_factory.mktemp("local"), chunk=4, workers=2)


def lines(batch: Batch) -> list[dict[str, Any]]:
    return [json.loads(line) for line in batch.path.read_text().splitlines()]


def test_each_picture_has_one_line_and_the_label_of_bare_onnx_runtime(
    pictures: Path, local: Batch
) -> None:
    spec = models.load("signs").spec
    session = onnxruntime.InferenceSession(models.load("signs").data)
    given = session.get_inputs()[0].name
    found = lines(local)
    files = sorted(path.relative_to(pictures).as_posix() for path in pictures.glob("*/*"))
    assert sorted(line["file"] for line in found) == files
    assert (local.pictures, local.failed, local.right, local.resumed) == (COUNT, 1, None, 0)
    for line in found:
        if "error" in line:
            assert "decode" in line["error"] or "truncated" in line["error"]
            continue
        tensor = preprocess(decode(pictures / line["file"]), spec)
        logits = session.run(None, {given: tensor.reshape(1, 3, spec.crop, spec.crop)})[0][0]
        assert line["index"] == logits.argmax()
        assert line["label"] == spec.labels[line["index"]]


def test_the_folders_names_are_the_truth_if_asked_for(pictures: Path, tmp_path: Path) -> None:
    seen = classify_folder(pictures, tmp_path / "out", truth=True, workers=1)
    known = [line for line in lines(seen) if "error" not in line]
    right = sum(SIGNS[line["index"]] == line["file"].split("/")[0] for line in known)
    assert seen.right == right < len(known) == COUNT - 1
    assert seen.top1 == right / len(known)
    assert "top-1" in str(seen)
    assert json.loads(json.dumps(seen.to_dict()))["top1"] == seen.top1


@pytest.mark.parametrize("workers", [1, 3])
def test_results_do_not_depend_on_how_many_work(
    pictures: Path, local: Batch, tmp_path: Path, workers: int
) -> None:
    seen = classify_folder(pictures, tmp_path / "out", chunk=7, workers=workers)
    assert seen.path.read_bytes() == local.path.read_bytes()


def test_a_second_run_finds_all_done(pictures: Path, local: Batch) -> None:
    again = classify_folder(pictures, local.path.parent, chunk=4)
    assert (again.resumed, again.failed, again.busy_seconds) == (COUNT, 1, 0)
    assert again.most_workers is None
    assert "earlier run" in str(again)


def test_a_killed_run_goes_on_where_it_was(pictures: Path, local: Batch, tmp_path: Path) -> None:
    """The process dies by SIGKILL as soon as some chunks are done."""
    out = tmp_path / "out"
    code = (
        "import sys; from edgelab.batch import classify_folder;"
        "classify_folder(sys.argv[1], sys.argv[2], chunk=1, workers=1)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(pictures), str(out)]) as child:
        while len(list(out.glob("part-*"))) < 3:
            assert child.poll() is None
            time.sleep(0.005)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    done = len(list(out.glob("part-*")))
    assert not (out / "results.jsonl").exists()
    seen = classify_folder(pictures, out, chunk=1)
    assert 3 <= seen.resumed == done < COUNT
    assert seen.path.read_bytes() == local.path.read_bytes()
    assert not list(out.glob("part-*"))


def test_another_jobs_results_are_kept(pictures: Path, local: Batch, tmp_path: Path) -> None:
    before = local.path.read_bytes()
    with pytest.raises(BatchError, match=r"another job \(chunk\)"):
        classify_folder(pictures, local.path.parent, chunk=5)
    grown = tmp_path / "grown"
    shutil.copytree(pictures, grown)
    shutil.copy(sorted(grown.glob("*/*"))[5], grown / "one more.png")
    with pytest.raises(BatchError, match=r"pictures_sha256"):
        classify_folder(grown, local.path.parent, chunk=4)
    assert local.path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 9999, b"[]", b"\xff", b"{}"])
def test_a_damaged_job_file_is_told(pictures: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "job.json").write_bytes(content)
    with pytest.raises(BatchError, match="another job"):
        classify_folder(pictures, tmp_path)


def test_a_folder_with_something_else_is_not_written_to(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BatchError, match=r"thesis\.tex"):
        classify_folder(pictures, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BatchError, match="can't make the folder"):
        classify_folder(pictures, tmp_path / "file" / "out")


def test_bad_calls_are_told(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chunk"):
        classify_folder(pictures, tmp_path / "out", chunk=0)
    with pytest.raises(BatchError, match="not both"):
        classify_folder(pictures, tmp_path / "out", workers=1, ray="local")
    with pytest.raises(EdgelabError, match="cannot read"):
        classify_folder(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(
    pictures: Path, local: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["batch", str(pictures), "--output", str(tmp_path / "out"), "--truth"]
    assert main([*command, "--chunk", "4"]) == 0
    text = capsys.readouterr().out
    assert f"{COUNT} pictures, 1 failed" in text
    assert "top-1" in text
    assert main([*command, "--chunk", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] == COUNT
    assert main([*command, "--chunk", "5"]) == 1
    assert "another job" in capsys.readouterr().err


# --- Ray: two nodes on this machine, each with its own raylet -------------------------------------


def start(utils: Any) -> Any:
    """Start a cluster of two nodes. Ray gives each 30 s, which a busy machine may exceed."""
    for attempt in range(4):
        made = utils.Cluster()
        try:
            made.add_node(num_cpus=1, include_dashboard=False)
            made.add_node(num_cpus=1)
            made.wait_for_nodes(120)
            with fatal_signal_handlers_kept():
                made.connect()
            return made
        except Exception as error:  # Ray raises a bare one
            made.shutdown()
            if attempt == 3 or "timed out" not in str(error):
                raise
            print(f"try {attempt + 2}, since: {error}")
    return None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    try:
        utils = importlib.import_module("ray.cluster_utils")
    except ImportError:
        if os.environ.get("CI"):
            raise
        pytest.skip("needs Ray: pip install 'edgelab[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_agent_register_timeout_ms", "120000")
        made = start(utils)
        yield made
        with fatal_signal_handlers_kept():
            importlib.import_module("ray").shutdown()
        made.shutdown()


def busy_workers() -> list[Any]:
    """Processes of Ray that run one of our tasks now."""
    psutil = importlib.import_module("psutil")
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[0].startswith("ray::_task"):
            found.append(process)
    return found


@pytest.mark.timeout(300)
def test_two_nodes_give_the_same_bytes(
    cluster: Any, pictures: Path, local: Batch, tmp_path: Path
) -> None:
    ray = importlib.import_module("ray")
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    seen = classify_folder(pictures, tmp_path / "out", ray="auto", chunk=2)
    assert seen.path.read_bytes() == local.path.read_bytes()
    assert seen.workers == 2
    assert seen.busy_seconds > seen.driver_seconds > 0


def test_a_guest_that_traps_is_still_an_error_when_ray_is_there(
    cluster: Any, pictures: Path, tmp_path: Path
) -> None:
    """In a process of its own: without care, the trap is its end."""
    code = (
        "import sys\nfrom edgelab import Guest\nfrom edgelab.batch import classify_folder\n"
        "guest = Guest(b'(module (func (export \"f\") unreachable))', cache=False)\n"
        "for ray in (None, sys.argv[3]):\n"
        "    classify_folder(*sys.argv[1:3], ray=ray)\n"
        "    try: guest.instantiate().call('f')\n"
        "    except Exception as error: print(type(error).__name__)"
    )
    command = [sys.executable, "-c", code, str(pictures), str(tmp_path / "out"), cluster.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["GuestError", "GuestError"], done.stderr


def test_workers_do_not_mix_up_models_that_differ_in_their_spec_only(
    cluster: Any, pictures: Path, tmp_path: Path
) -> None:
    """Workers live from job to job, and keep a pipeline."""
    model = models.load("signs")
    renamed = replace(model.spec, labels=tuple(label.upper() for label in model.spec.labels))
    other = replace(model, spec=renamed)
    for name, each in (("first", model), ("second", other)):
        seen = classify_folder(pictures, tmp_path / name, each, ray="auto", chunk=4)
        alone = classify_folder(pictures, tmp_path / f"{name} alone", each, chunk=4)
        assert seen.path.read_bytes() == alone.path.read_bytes()


@pytest.mark.timeout(300)
def test_a_killed_worker_and_a_lost_node_cost_nothing(
    cluster: Any, pictures: Path, local: Batch, tmp_path: Path
) -> None:
    """First SIGKILL for a process in the middle of a chunk, then for a raylet with its workers."""
    out = tmp_path / "out"
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    killed: list[int] = []
    lost: list[bool] = []

    def kill() -> None:
        while not out.is_dir() or len(list(out.glob("part-*"))) < 2:
            time.sleep(0.005)
        while not (working := busy_workers()):
            time.sleep(0.005)
        working[0].kill()
        killed.append(working[0].pid)
        cluster.remove_node(node, allow_graceful=False)
        lost.append(not (out / "results.jsonl").exists())

    killer = threading.Thread(target=kill)
    killer.start()
    seen = classify_folder(pictures, out, ray="auto", chunk=1)
    killer.join()
    assert killed
    assert lost == [True], "the node was lost after the job's end: nothing was tested"
    assert seen.path.read_bytes() == local.path.read_bytes()
    assert (seen.pictures, seen.resumed) == (COUNT, 0)


def test_a_node_that_does_not_see_the_folder_says_so(
    cluster: Any, pictures: Path, tmp_path: Path
) -> None:
    from edgelab import batch

    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    model = models.load("signs")
    work = batch._Cluster(model, tmp_path / "only here", "auto")
    with pytest.raises(BatchError, match="every node must see it"):
        list(work.run([(0, (("a.png", -1),))]))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_no_cluster_is_told(pictures: Path, tmp_path: Path, address: str) -> None:
    """In a process of its own: this one has a cluster."""
    code = (
        "import sys\nfrom edgelab.batch import classify_folder\n"
        "from edgelab.errors import BatchError\n"
        "try: classify_folder(*sys.argv[1:3], ray=sys.argv[3])\n"
        "except BatchError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(pictures), str(tmp_path / "out"), address]
    alone = {**os.environ, "RAY_TMPDIR": str(tmp_path)}
    alone.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=alone)
    assert "can't reach a Ray cluster" in done.stdout, done.stderr
    assert "ray start --head" in done.stdout
