"""Deployment: manifests against schemas and hostile names, and the Containerfile, step by step."""

from __future__ import annotations

import copy
import csv
import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from edgelab import deploy, manifests
from edgelab.build import guest_path
from edgelab.cli import main
from edgelab.deploy import Footprint, Manifest, Plan
from edgelab.errors import EdgelabError
from edgelab.manifests import check
from edgelab.models import example_image, models_dir
from edgelab.runtime import Guest
from edgelab.sizes import package_files, python_files, size_of, sizes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
MEASURED = Footprint("signs", 1, 3.0, 240 * MIB, 420 * MIB, 1200 * MIB, 16)
DIGEST = "registry.example/team/signs@sha256:" + "0123456789abcdef" * 4
PLANS = {
    "ships": Plan("signs", MEASURED),
    "image": Plan("signs", MEASURED, model_image=DIGEST),
    "download": Plan("mobilenetv2-12", MEASURED),
}


def one(kind: str, documents: list[Manifest]) -> Manifest:
    (found,) = (each for each in documents if each["kind"] == kind)
    return found


def container_of(documents: list[Manifest]) -> Manifest:
    found: Manifest = one("Deployment", documents)["spec"]["template"]["spec"]["containers"][0]
    return found


# --- what is generated ----------------------------------------------------------------------------


@pytest.mark.parametrize("delivery", PLANS)
@pytest.mark.parametrize("version", ["1.31", "1.34", manifests.KUBERNETES])
def test_all_manifests_pass_the_schemas_and_the_rules(delivery: str, version: str) -> None:
    plan = PLANS[delivery]
    assert plan.delivery == delivery
    for made in (deploy.kubernetes(plan), deploy.kserve(plan)):
        assert not check(made, version=version, footprint=MEASURED)
    assert not check(deploy.wasm("registry.example/cli:1"), version=version)


def test_an_older_kubernetes_has_no_image_volumes() -> None:
    assert not check(deploy.kubernetes(PLANS["ships"]), version="1.30")
    (found,) = check(deploy.kubernetes(PLANS["image"]), version="1.30")
    assert found.rule == "schema"
    assert "'image' was unexpected" in found.message
    with pytest.raises(EdgelabError, match=r"no schemas for Kubernetes '1\.5'"):
        check([], version="1.5")


def test_limits_follow_the_measurement() -> None:
    small, large = (
        container_of(deploy.kubernetes(Plan("signs", replace(MEASURED, worst_bytes=size * MIB))))
        for size in (500, 1000)
    )
    assert small["resources"]["limits"]["memory"] == "640Mi"  # 500 MiB * 1.25 = 625
    assert large["resources"]["limits"]["memory"] == "1264Mi"
    assert small["resources"]["requests"]["memory"] == "528Mi"
    two = container_of(deploy.kubernetes(Plan("signs", replace(MEASURED, workers=2))))
    assert two["resources"]["limits"]["cpu"] == "2"
    assert two["args"][-2:] == ["--workers", "2"]


def test_the_model_is_pinned_however_it_comes() -> None:
    pinned = models_dir() / "signs" / "signs.onnx"
    sha256 = hashlib.sha256(pinned.read_bytes()).hexdigest()
    for made in (deploy.kubernetes(PLANS["ships"]), deploy.kubernetes(PLANS["image"])):
        assert one("Deployment", made)["metadata"]["annotations"]["edgelab/model-sha256"] == sha256
    sums = one("ConfigMap", deploy.kubernetes(PLANS["image"]))
    assert sums["data"]["SHA256SUMS"] == f"{sha256}  /models/signs.onnx\n"
    assert sha256[:12] in sums["metadata"]["name"]
    pod = one("Deployment", deploy.kubernetes(PLANS["download"]))["spec"]["template"]["spec"]
    assert pod["initContainers"][0]["command"][-3:] == ["models", "fetch", "mobilenetv2-12"]
    own = Plan(f"mine={pinned}", MEASURED, model_image=DIGEST)
    assert own.sha256 == sha256
    assert container_of(deploy.kubernetes(own))["args"][0] == "mine=/models/mine.onnx"


def test_kserve_and_kubernetes_run_the_same_server() -> None:
    plain = container_of(deploy.kubernetes(PLANS["ships"]))
    made = deploy.kserve(PLANS["ships"])
    runtime = one("ServingRuntime", made)["spec"]["containers"][0]
    model = one("InferenceService", made)["spec"]["predictor"]["model"]
    assert [*runtime.get("args", ()), *model["args"]] == plain["args"]  # KServe appends the second
    for key in ("image", "resources", "securityContext", "readinessProbe", "livenessProbe"):
        assert runtime[key] == plain[key]
    served = one("InferenceService", deploy.kserve(PLANS["image"]))["spec"]["predictor"]
    pod = one("Deployment", deploy.kubernetes(PLANS["image"]))["spec"]["template"]["spec"]
    assert served["initContainers"] == pod["initContainers"]
    assert {"name": "model", "mountPath": "/models", "readOnly": True} in (
        served["model"]["volumeMounts"]
    )
    assert [each for each in pod["volumes"] if each["name"] != "cache"] == served["volumes"]


def test_the_network_is_closed_but_for_a_download() -> None:
    def out(delivery: str) -> Any:
        return one("NetworkPolicy", deploy.kubernetes(PLANS[delivery]))["spec"]["egress"]

    assert out("ships") == out("image") == []
    (only,) = out("download")
    assert {each["port"] for each in only["ports"]} == {53, 443}


def test_yaml_says_what_the_data_says(tmp_path: Path) -> None:
    for plan in PLANS.values():
        made = deploy.kubernetes(plan)
        text = deploy.to_yaml(made)
        assert list(yaml.safe_load_all(text)) == made
        assert not re.search(r"[&*]id\d", text)  # written out, not referred to
    written = deploy.write(PLANS["image"], tmp_path / "new", wasm_image="registry.example/cli:1")
    assert [path.name for path in written] == ["kubernetes.yaml", "kserve.yaml", "wasm.yaml"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(
        path.name for path in written
    )
    assert manifests.read(written[0]) == deploy.kubernetes(PLANS["image"])


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "kserve.yaml").mkdir()
    with pytest.raises(EdgelabError, match=r"can't write .*kserve\.yaml"):
        deploy.write(PLANS["ships"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kserve.yaml", "kubernetes.yaml"]


def test_measuring_leaves_this_process_to_tritonclient() -> None:
    """kserve and tritonclient register the same protocol: a process can import one of them."""
    code = (
        "import sys\nfrom edgelab import deploy\ndeploy.MAX_PIXELS = 1 << 20\n"
        "deploy.measure_footprint('signs', photos=1)\nassert 'kserve' not in sys.modules\n"
        "import tritonclient.grpc"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_command_measures_writes_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not os.environ.get("EDGELAB_FULL"):  # lesson 09 sends the largest as well
        monkeypatch.setattr(deploy, "MAX_PIXELS", 1 << 24)
    out = ["--output", str(tmp_path), "--wasm-image", "registry.example/cli:1"]
    assert main(["deploy", "signs", *out, "--image", "localhost/edgelab:1"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    found = re.search(
        r"ready after ([\d.]+) s; (\d+) MiB idle, (\d+) MiB with photos .*, (\d+) MiB with the "
        r"largest .*request (\d+) MiB, limit (\d+) MiB",
        first,
    )
    assert found, first
    idle, photo, worst, request, limit = map(int, found.groups()[1:])
    assert 100 < idle < photo < worst  # each is the peak of more than the one before
    assert request >= photo * deploy.HEADROOM - 1
    assert limit >= worst * deploy.HEADROOM - 1
    assert sum(line.endswith(": nothing is wrong") for line in rest) == 3
    container = container_of(manifests.read(tmp_path / "kubernetes.yaml"))
    assert container["resources"]["limits"]["memory"] == f"{limit}Mi"
    files = [str(tmp_path / name) for name in ("kubernetes.yaml", "kserve.yaml")]
    assert main(["deploy", "--check", *files, "--kubernetes", "1.34"]) == 0
    assert capsys.readouterr().out == "nothing is wrong\n"
    bad = tmp_path / "bad.yaml"
    bad.write_text(deploy.to_yaml(deploy.article(b"\0asm")))
    assert main(["deploy", "--check", str(bad), "--json"]) == 1
    assert {each["rule"] for each in json.loads(capsys.readouterr().out)} >= {"mount", "probes"}
    assert main(["deploy", "no-such-model"]) == 1
    assert "no model is named 'no-such-model'" in capsys.readouterr().err


# --- hostile names and files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    ["", "Signs", "signs\n", "signs;id", "../signs", "-signs", "signs-", "s" * 41, "si gns",
     "signs: {}", "$(id)", "signs\0", "no-such-model", "../../x=signs.onnx"],
)  # fmt: skip
def test_hostile_model_names_are_refused(model: str) -> None:
    with pytest.raises(EdgelabError):
        Plan(model, MEASURED)
    with pytest.raises(EdgelabError):
        Plan(model, MEASURED, model_image=DIGEST)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ("", "is no image reference"),
        ("edgelab", "says not which version"),
        ("registry.example:5000/edgelab", "says not which version"),
        ("edgelab:latest", "says not which version"),
        ("edgelab:1\nprivileged: true", "is no image reference"),
        ("edgelab:1\n", "is no image reference"),
        ("Edgelab:1", "is no image reference"),
        ("../edgelab:1", "is no image reference"),
        ("edgelab:1 --privileged", "is no image reference"),
        ("https://registry.example/edgelab:1", "is no image reference"),
        ("edgelab@sha256:" + "0" * 63, "is no image reference"),
        ("a/" * 300 + "edgelab:1", "is no image reference"),
        ("a" * 100_000 + "!", "is no image reference"),  # in no time: nothing backtracks for long
    ],
)
def test_hostile_image_references_are_refused(image: str, why: str) -> None:
    with pytest.raises(EdgelabError, match=why):
        Plan("signs", MEASURED, image=image)
    with pytest.raises(EdgelabError):
        deploy.wasm(image)


def test_image_references_that_are_right() -> None:
    for image in (
        "edgelab:0.1.0",
        "localhost/edgelab:1",
        "registry.example:5000/a/b-c__d/e.f:1_2",
        "edgelab@sha256:" + "0" * 64,
        "r.example/edgelab:1@sha256:" + "f" * 64,
    ):
        assert deploy.check_image(image) == image
    with pytest.raises(EdgelabError, match="A tag can be moved"):
        Plan("signs", MEASURED, model_image="registry.example/signs:1")
    with pytest.raises(EdgelabError, match="put it into an image"):
        Plan("mine=signs.onnx", MEASURED)
    with pytest.raises(EdgelabError, match="replicas"):
        Plan("signs", MEASURED, replicas=0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: &a [1]\nb: *a\n", "aliases"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases"),
        ("{", "is no YAML"),
        ("- 1\n", "holds list"),
        ("a: !!python/object/apply:os.system [id]\n", "is no YAML"),
        ("\0", "is no YAML|can't read"),
        ("[" * 100_000, "is no YAML"),
    ],
)
def test_hostile_files_are_refused(text: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(EdgelabError, match=why):
        manifests.read(file)


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"apiVersion": "../../../../etc/v1", "kind": "Pod"},
        {"apiVersion": "v1", "kind": "../x"},
        {"apiVersion": "v1", "kind": "Nothing"},
        {"apiVersion": 1, "kind": None},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": None, "spec": 3},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": 1}},
        {"apiVersion": "serving.kserve.io/v1beta1", "kind": "TrainedModel"},
        {"apiVersion": "elsewhere.example/v1", "kind": "Thing", "metadata": {"name": "x"}},
    ],
)
def test_what_is_no_manifest_is_a_finding(manifest: Manifest) -> None:
    (found,) = check([manifest])
    assert found.rule == "schema"


# --- schemas --------------------------------------------------------------------------------------


def changed(document: Manifest, path: str, value: Any) -> Manifest:
    """A copy with another value at a place; None takes it away."""
    made = copy.deepcopy(document)
    place: Any = made
    *above, last = (int(part) if part.isdecimal() else part for part in path.split("."))
    for part in above:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return made


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", "spec.replica", 3),
        ("Deployment", "spec.replicas", "three"),
        ("Deployment", "spec.selector", None),
        ("Deployment", "spec.template.spec.containers.0.name", None),
        ("Deployment", "spec.template.spec.containers.0.readinessprobe", {}),
        ("Service", "spec.ports.0.port", "http"),
        ("NetworkPolicy", "spec.podSelector", []),
        ("ServingRuntime", "spec.containers", None),
        ("ServingRuntime", "spec.protocolVersion", ["v2"]),
        ("ServingRuntime", "spec.supportedModelFormats.0.autoSelect", "no"),
        ("ServingRuntime", "spec.containers.0.livenessProbe.httpGet.port", None),
        ("InferenceService", "spec.predictor", None),
        ("InferenceService", "spec.predictor.minReplicas", "3"),
        ("InferenceService", "spec.predictor.model.storageURI", "oci://x"),
        ("InferenceService", "spec.predictor.model.modelFormat", None),
        ("InferenceService", "spec.predictor.securityContext.runAsRoot", True),
    ],
)
def test_a_wrong_field_is_found(kind: str, path: str, value: Any) -> None:
    made = [*deploy.kubernetes(PLANS["ships"]), *deploy.kserve(PLANS["ships"])]
    document = one(kind, made)
    assert not check([document])
    found = check([changed(document, path, value)])
    assert [each.rule for each in found] == ["schema"], found


def test_kserve_schemas_take_what_its_documentation_shows() -> None:
    """Documents of KServe's own users' guide, in their form."""
    runtime = {
        "apiVersion": "serving.kserve.io/v1alpha1", "kind": "ServingRuntime",
        "metadata": {"name": "example"},
        "spec": {
            "supportedModelFormats": [{"name": "example", "version": "1", "autoSelect": True}],
            "containers": [{"name": "kserve-container", "image": "example:1",
                            "args": ["--model_dir=/mnt/models", "--http_port=8080"]}],
        },
    }  # fmt: skip
    service = {
        "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService",
        "metadata": {"name": "example", "annotations": {"a": "b"}},
        "spec": {"predictor": {"minReplicas": 1, "model": {
            "modelFormat": {"name": "sklearn"}, "protocolVersion": "v2",
            "storageUri": "gs://bucket/model",
            "resources": {"requests": {"cpu": "1", "memory": "2Gi"}},
        }}},
    }  # fmt: skip
    assert not [each for each in check([runtime, service]) if each.rule == "schema"]


# --- what the article deploys ---------------------------------------------------------------------


def test_the_articles_manifest_is_well_formed_and_wrong_in_every_way_it_is_said_to_be() -> None:
    module = guest_path("classify").path.read_bytes()
    made = deploy.article(module + b"\0" * MIB)  # with a model inside, it is larger still
    found = check(made, footprint=MEASURED)
    rules = {each.rule for each in found}
    assert rules == set(manifests.RULES) - {"schema", "resources"}
    assert all(rule in str(found) for rule in rules)
    size = next(each.message for each in found if each.rule == "configmap-size")
    assert f"{len(module) + MIB:,} bytes" in size
    assert "1,048,576" in size
    memory = next(each.message for each in found if each.rule == "memory")
    assert "never starts" in memory


def test_each_of_the_articles_faults_is_gone_when_it_is_cured() -> None:
    def rules(documents: list[Manifest]) -> set[str]:
        return {each.rule for each in check(documents, footprint=MEASURED)}

    place = "spec.template.spec.containers.0"
    config, deployment = deploy.article(guest_path("classify").path.read_bytes())
    assert "configmap-size" not in rules([config, deployment])  # it is the model that is too large
    cured = changed(deployment, f"{place}.volumeMounts.0.mountPath", "/guest")
    cured = changed(cured, f"{place}.command", ["wasmedge", "/guest/infer.wasm"])
    assert "mount" in rules([config, deployment])
    assert "mount" not in rules([config, cured])
    assert "entry-point" in rules([config, cured])  # still a library
    program, _ = deploy.article(guest_path("cli").path.read_bytes())
    assert "entry-point" not in rules([program, cured])
    reactor = changed(cured, f"{place}.command", ["wasmedge", "--reactor", "/guest/infer.wasm"])
    assert "entry-point" not in rules([config, reactor])
    probe = {"httpGet": {"path": "/", "port": 80}}
    assert "probes" in rules([config, changed(cured, f"{place}.livenessProbe", probe)])
    ready = changed(
        changed(cured, f"{place}.livenessProbe", probe), f"{place}.readinessProbe", probe
    )
    assert "probes" not in rules([config, ready])
    roomy = changed(cured, f"{place}.resources.limits.memory", "2Gi")
    assert "memory" not in rules([config, roomy])


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("resources.limits.memory", "1Gi", "memory"),
        ("resources.limits.memory", None, "resources"),
        ("resources", None, "resources"),
        ("image", "edgelab:latest", "image"),
        ("command", ["/opt/edgelab/bin/python -m edgelab serve"], "entry-point"),
        ("command", ["/cache/python"], "mount"),
        ("volumeMounts.0.mountPath", "/models", "mount"),
        ("livenessProbe", None, "probes"),
        ("securityContext", None, "security"),
        ("securityContext.readOnlyRootFilesystem", False, "security"),
        ("securityContext.capabilities.drop", ["NET_RAW"], "security"),
        ("securityContext.privileged", True, "security"),
    ],
)
def test_each_rule_catches_its_fault(path: str, value: Any, rule: str) -> None:
    made = deploy.kubernetes(PLANS["image"])
    deployment = one("Deployment", made)
    broken = changed(deployment, f"spec.template.spec.containers.0.{path}", value)
    found = check([broken, *(each for each in made if each is not deployment)], footprint=MEASURED)
    assert {each.rule for each in found} == {rule}, found


@pytest.mark.parametrize(
    ("path", "value"),
    [("securityContext", None), ("securityContext.runAsNonRoot", False), ("hostNetwork", True),
     ("securityContext.seccompProfile.type", "Unconfined")],
)  # fmt: skip
def test_a_pod_that_is_not_restricted_is_found(path: str, value: Any) -> None:
    deployment = one("Deployment", deploy.kubernetes(PLANS["ships"]))
    (found,) = check([changed(deployment, f"spec.template.spec.{path}", value)])
    assert found.rule == "security"


def test_quantities() -> None:
    for text, value in (("128Mi", 128 * MIB), ("500m", 0.5), ("1.5Gi", 1.5 * (1 << 30)),
                        ("2", 2), ("64M", 64e6), (3, 3)):  # fmt: skip
        assert manifests.quantity(text) == value
    for text in ("", "Mi", "1 Mi", "1e99", "-1", "1mi", "9" * 99):
        with pytest.raises(EdgelabError):
            manifests.quantity(text)


def test_the_wasm_pod_runs_the_guest_with_its_image_as_root(tmp_path: Path) -> None:
    container = one("Pod", deploy.wasm("registry.example/cli:1"))["spec"]["containers"][0]
    shutil.copy(guest_path("cli").path, tmp_path / "cli.wasm")
    shutil.copy(models_dir() / "signs" / "tiny.safetensors", tmp_path)
    image = tmp_path / posixpath.relpath(container["command"][0], "/")
    request = {
        "image_data": [0.5] * 3 * 32 * 32,
        "width": 32,
        "height": 32,
        "model_id": "signs-tiny",
    }
    instance = Guest(image).instantiate(
        args=container["args"], dirs={"/": tmp_path}, stdin=json.dumps(request).encode()
    )
    assert instance.run() == 0, instance.stderr
    assert json.loads(instance.stdout)["label"]


# --- sizes ----------------------------------------------------------------------------------------


def test_size_of_counts_files_once_and_compresses_as_a_layer(tmp_path: Path) -> None:
    data = {"a.bin": bytes(100_000), "deep/b.bin": os.urandom(5_000), "deep/c.txt": b"x" * 10}
    for name, content in data.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_bytes(b"y" * 999)
    os.link(tmp_path / "a.bin", tmp_path / "same.bin")
    (tmp_path / "link").symlink_to("a.bin")
    (tmp_path / "loop").symlink_to(".")
    found = size_of(tmp_path, tmp_path / "a.bin")
    assert (found.files, found.disk_bytes) == (3, 105_010)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in data:
            tar.add(tmp_path / name)
    layer = len(gzip.compress(archive.getvalue(), 6))
    assert found.compressed_bytes == pytest.approx(layer, rel=0.02)
    assert size_of(tmp_path, compress=False).compressed_bytes is None
    assert (found + found).disk_bytes == 210_020
    with pytest.raises(EdgelabError, match="can't measure"):
        size_of(tmp_path / "none")


def test_package_files_are_those_that_the_package_lists() -> None:
    record = importlib.metadata.distribution("wasmtime").read_text("RECORD")
    assert record is not None
    listed = sum(int(row[2]) for row in csv.reader(record.splitlines()) if row[2])
    found = size_of(*package_files("wasmtime", dependencies=False), compress=False)
    assert found.disk_bytes == pytest.approx(listed, rel=0.001)  # RECORD does not count itself
    alone, whole = (
        {path.parts[-2] for path in package_files("onnxruntime", dependencies=d)}
        for d in (False, True)
    )
    assert "numpy" in whole - alone
    served = {str(path) for path in package_files("edgelab[serve]")}
    assert any("/kserve/" in path for path in served)
    assert not any("/pytest/" in path for path in served)
    with pytest.raises(EdgelabError, match="is not installed here"):
        package_files("no-such-package-anywhere")


def test_python_files_are_what_a_program_needs() -> None:
    names = {path.name for path in python_files()}
    assert {"asyncio", "json"} <= {path.parent.name for path in python_files()}
    assert Path(sys.executable).resolve() in python_files()
    assert "os.py" in names
    assert not any({"site-packages", "test", "tests"} & set(path.parts) for path in python_files())


def test_sizes_are_sums_of_measured_parts() -> None:
    weighed = sizes(compress=False)
    signs = (models_dir() / "signs" / "signs.onnx").stat().st_size
    assert weighed["signs.onnx"].size is not None
    assert weighed["signs.onnx"].size.disk_bytes == signs
    for row in weighed.deployments:
        if row.size is None:
            assert row.note.startswith("not measurable here: ")
        else:
            parts = [weighed[name].size for name in row.what.split(" + ")]
            assert row.size.disk_bytes == sum(part.disk_bytes for part in parts if part)
    wasi_nn = weighed["Wasmtime + WASI-NN"]
    bare = weighed["Python + ONNX Runtime"]
    assert wasi_nn.size is not None
    assert bare.size is not None
    assert wasi_nn.size.disk_bytes > bare.size.disk_bytes > 100_000_000
    assert {"C++ + TensorRT", "Go + TFLite"} <= {row.name for row in weighed.deployments}
    assert "<caption>" in weighed._repr_html_()
    assert "Python + ONNX Runtime" in str(weighed)
    if os.environ.get("CI"):  # a reader may be without network
        assert weighed["wasmedge"].size is not None, weighed["wasmedge"].note


# --- the Containerfile ----------------------------------------------------------------------------

Step = tuple[str, str]  # instruction, the rest of its line


def containerfile() -> list[Step]:
    text = (ROOT / "Containerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def last(instruction: str) -> str:
    return [rest for name, rest in containerfile() if name == instruction][-1]


def test_the_containerfile_is_pinned_and_not_root() -> None:
    base = last("ARG").removeprefix("BASE=")
    assert re.fullmatch(r"docker\.io/library/debian:trixie-\d{8}-slim", base)
    stages = [rest for name, rest in containerfile() if name == "FROM"]
    assert stages == ["${BASE} AS build", "${BASE}"]
    assert last("USER") == f"{deploy.USER}:{deploy.USER}"
    assert json.loads(last("ENTRYPOINT")) == [
        deploy.PYTHON, "-m", "edgelab", "serve", "--host", "0.0.0.0",
    ]  # fmt: skip
    assert f"{deploy.HTTP_PORT} {deploy.GRPC_PORT}" == last("EXPOSE")
    installs = [rest for name, rest in containerfile() if name == "RUN" and "pip --" in rest]
    assert all("--require-hashes" in line or "--no-deps" in line for line in installs)


def test_the_lock_holds_what_the_project_asks_for() -> None:
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"\n(?=[a-z0-9])", text)[1:]
    locked = {}
    for entry in entries:
        assert "--hash=sha256:" in entry, entry
        name, version = re.split(r"==|\s", entry)[:2]
        locked[name] = version
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*facts["dependencies"], *facts["optional-dependencies"]["serve"]]
    for line in wanted:
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"python_version": "3.13"}):
            version = locked[need.name]
            assert need.specifier.contains(version), f"{line}: {version}; make requirements.lock"


class Image:
    """A tree that the Containerfile's steps have been executed in, and what it says of running.

    In place of an engine: a mount and a network namespace of Linux, and chroot. The base image's
    files are this system's ``/usr``, read only, with the Python that runs the tests; so nothing is
    installed by apt. Third-party packages are those of this environment, which the lock's step
    would take two minutes to download: `EDGELAB_FULL=1` does that too.
    """

    def __init__(self, work: Path) -> None:
        work.chmod(0o755)  # another user must get in
        self.root = work / "build"
        self.environment: dict[str, str] = {}
        self.folder = Path("/")
        for name, rest in containerfile()[1:]:
            if name == "FROM":
                self.root = work / ("build" if " AS " in rest else "final")
                self.folder = Path("/")
                skeleton(self.root)
            elif name == "RUN":
                self._run(rest)
            elif name == "COPY":
                self._copy(work, rest.split())
            elif name == "WORKDIR":
                self.folder = Path(rest)
                self.at(rest).mkdir(parents=True, exist_ok=True)
            elif name == "ENV":
                self.environment |= dict(each.split("=", 1) for each in shlex.split(rest))

    def at(self, path: str | Path) -> Path:
        return self.root / Path(path).relative_to("/")

    def _copy(self, work: Path, words: list[str]) -> None:
        source, root = ROOT, self.root
        if words[0].startswith("--from="):
            source = work / words.pop(0).removeprefix("--from=")
        *names, target = words
        destination = root / (self.folder / target).relative_to("/")
        for name in names:
            path = source / name.lstrip("/")
            if path.is_dir():
                shutil.copytree(
                    path, destination, symlinks=True, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("__pycache__", "work"),
                )  # fmt: skip
            else:
                destination.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, destination)

    def _run(self, command: str) -> None:
        if "apt-get" in command:
            return
        if "--require-hashes" in command and not os.environ.get("EDGELAB_FULL"):
            site = next(self.at("/opt/edgelab").glob("lib/python*/site-packages"))
            here = sysconfig.get_paths()["purelib"]
            # Added as `site` does, but without its .pth files: this checkout must not come along.
            (site / "here.pth").write_text(f"{here}\n")
            return
        done = subprocess.run(
            inside(self.root, ["sh", "-c", f"cd {self.folder} && {command}"], network=True),
            capture_output=True, text=True, check=False,
            env={
                "PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin",
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                # The build backend is that of this environment as well. (0 means: not isolated.)
                **({} if os.environ.get("EDGELAB_FULL") else
                   {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}),
            },
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def skeleton(root: Path) -> None:
    for name in ("proc", "dev", "tmp", "usr", "etc", "opt"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):  # of Debian: links into /usr
        if Path("/", name).is_symlink():
            (root / name).symlink_to(os.readlink(Path("/", name)))
        elif Path("/", name).is_dir():
            (root / name).mkdir()
    for folder in (sys.base_prefix, sys.prefix):
        (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
    (root / "dev" / "null").touch()
    (root / "dev" / "urandom").touch()


# Runs in its own namespaces: mounts the tree's parts, brings loopback up, and becomes the command.
INSIDE = r"""
import fcntl, os, socket, struct, subprocess, sys
root, user, lend, command = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(":"), sys.argv[4:]
def mount(*words):
    subprocess.run(["mount", *words], check=True)
mount("--make-rprivate", "/")
mount("--bind", root, root)
for folder in lend:
    if os.path.isdir(folder) and not os.path.islink(folder):
        mount("--bind", folder, root + folder)
        mount("-o", "remount,bind,ro", root + folder)
for device in ("/dev/null", "/dev/urandom"):
    mount("--bind", device, root + device)
mount("-t", "proc", "proc", root + "/proc")
if user:
    # As engines mount one: everybody's, and nothing in it can be executed.
    mount("-t", "tmpfs", "-o", "mode=1777,noexec,nosuid,nodev", "cache", root + "/cache")
    mount("-o", "remount,bind,ro", root)
    with socket.socket() as loopback:  # SIOCSIFFLAGS, IFF_UP
        fcntl.ioctl(loopback, 0x8914, struct.pack("16sh14x", b"lo", 1))
os.chroot(root)
os.chdir("/")
if user:
    command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs",
               "--bounding-set=-all", "--inh-caps=-all", *command]
os.execvp(command[0], command)
"""


def inside(root: Path, command: list[str], *, network: bool = False) -> list[str]:
    """A command line that runs in the tree: as root to build, else as the image's user."""
    lend = ":".join(dict.fromkeys(
        ["/usr", "/bin", "/sbin", "/lib", "/lib64", sys.base_prefix, sys.prefix]
    ))  # fmt: skip
    spaces = ["--mount"] if network else ["--mount", "--net", "--pid", "--fork", "--kill-child"]
    user = 0 if network else deploy.USER
    return [
        "unshare", *spaces, sys.executable, "-c", INSIDE, str(root), str(user), lend, *command,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    trial = ["unshare", "--mount", "--net", "mount", "--make-rprivate", "/"]
    why = ""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        why = "needs root on Linux"
    elif not all(map(shutil.which, ("unshare", "setpriv", "mount"))):
        why = "needs util-linux"
    elif subprocess.run(trial, check=False, capture_output=True).returncode:
        why = "this container may not make namespaces"
    if why:
        if os.environ.get("CI"):
            pytest.fail(f"CI executes the Containerfile's steps: {why}")
        pytest.skip(f"executes the Containerfile's steps: {why}")
    work = tmp_path_factory.mktemp("image")
    for parent in (work, *work.parents):  # pytest closes its folders to others
        if parent.owner() == "root" and parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(0o711)
    return Image(work)


@pytest.fixture(scope="module")
def running(image: Image) -> Iterator[subprocess.Popen[str]]:
    """The image as the generated Deployment runs it, with the model from an image volume."""
    made = deploy.kubernetes(PLANS["image"])
    container = container_of(made)
    for folder in ("models", "pins"):
        image.at(f"/{folder}").mkdir()
    shutil.copy(models_dir() / "signs" / "signs.onnx", image.at("/models"))
    image.at("/pins/SHA256SUMS").write_text(one("ConfigMap", made)["data"]["SHA256SUMS"])
    environment = {
        **image.environment,
        **{each["name"]: each["value"] for each in container["env"] if "value" in each},
    }
    process = subprocess.Popen(
        inside(image.root, [*json.loads(last("ENTRYPOINT")), *container["args"]]),
        env={"PATH": "/usr/bin:/bin", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def server_of(process: subprocess.Popen[str]) -> int:
    """The server's process id, outside of its namespace: the child of unshare."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.05)
    raise AssertionError("no child")


PROBE = """
import sys, urllib.request
body = open(sys.argv[2], "rb").read() if len(sys.argv) > 2 else None
request = urllib.request.Request(sys.argv[1], body, {"Content-Type": "image/jpeg"} if body else {})
with urllib.request.urlopen(request, timeout=20) as answer:
    print(answer.status, answer.read().decode())
"""


def in_network(process: subprocess.Popen[str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["nsenter", f"--net=/proc/{server_of(process)}/ns/net", *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_image_runs_read_only_as_nobody_and_answers_its_probes(
    image: Image, running: subprocess.Popen[str]
) -> None:
    assert running.stdout is not None
    container = container_of(deploy.kubernetes(PLANS["image"]))
    url = "http://127.0.0.1:" + str(container["ports"][0]["containerPort"])
    said = [running.stdout.readline() for _ in range(2)]
    assert said[0] == "HTTP: http://0.0.0.0:8080/v2\n", said
    assert said[1] == "gRPC: 0.0.0.0:8081\n"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        done = in_network(
            running, sys.executable, "-c", PROBE, url + container[probe]["httpGet"]["path"]
        )
        assert done.stdout.startswith("200 "), done.stderr
    infer = f"{url}/v2/models/signs/infer"
    done = in_network(running, sys.executable, "-c", PROBE, infer, str(example_image()))
    assert '"label":"stop"' in done.stdout, done.stderr
    health = last("HEALTHCHECK").split("CMD ", 1)[1]
    (_, *script) = json.loads(health)
    assert in_network(running, sys.executable, *script).returncode == 0
    # What the kernel says of it.
    status = Path(f"/proc/{server_of(running)}/status").read_text()
    assert re.search(rf"^Uid:(\t{deploy.USER}){{4}}$", status, re.M), status
    assert "NoNewPrivs:\t1" in status
    for capabilities in ("CapEff", "CapPrm", "CapBnd"):
        assert re.search(rf"^{capabilities}:\t0+$", status, re.M), status
    # Each compiled its own machine code, under its own key: the image brought none.
    assert not list(image.at("/cache").iterdir())
    assert not list(image.root.glob("**/*.cwasm"))
    cache = Path(f"/proc/{server_of(running)}/root/cache")
    assert (cache / "aot.key").stat().st_mode & 0o777 == 0o600
    assert len(list((cache / "aot").glob("*.cwasm"))) == 1
    with pytest.raises(OSError, match="Read-only file system"):
        Path(f"/proc/{server_of(running)}/root", "opt", "x").touch()
    os.kill(server_of(running), 15)
    assert running.wait(30) == 0
    rest = running.stdout.read()
    assert "Traceback" not in rest
    assert "no ahead-of-time cache" not in rest


def test_the_check_of_the_model_passes_and_fails(
    image: Image, running: subprocess.Popen[str]
) -> None:
    pod = one("Deployment", deploy.kubernetes(PLANS["image"]))["spec"]["template"]["spec"]
    command = inside(image.root, pod["initContainers"][0]["command"])
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "/models/signs.onnx: OK\n"), done.stderr
    with open(image.at("/models/signs.onnx"), "r+b") as file:
        file.seek(5_000_000)
        file.write(b"?")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAILED" in done.stdout
