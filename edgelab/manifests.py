"""Check manifests before a cluster does: against schemas, and for what no schema can see.

Schemas of Kubernetes' own kinds are those of the package ``kubernetes-validate``. Those of KServe's
kinds are taken from the classes of the package ``kserve``, which are generated from its API. Both
strictly: a field that does not exist is an error, as a kind without a schema is.
"""

from __future__ import annotations

import base64
import binascii
import functools
import importlib.util
import json
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelab.deploy import Footprint, Manifest, check_image
from edgelab.errors import EdgelabError, GuestError, one_line
from edgelab.measure import html_table
from edgelab.wasm import interface

CONFIGMAP_BYTES = 1 << 20
"""What Kubernetes' API server takes at most as the data of one ConfigMap: 1 MiB."""
KUBERNETES = "1.37"
"""The version whose schemas count, unless told."""
_MAX_FILE_BYTES = 64 << 20
_GROUP_KINDS = {
    ("serving.kserve.io/v1alpha1", "ServingRuntime"): "V1alpha1ServingRuntime",
    ("serving.kserve.io/v1beta1", "InferenceService"): "V1beta1InferenceService",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a manifest.

    Attributes
    ----------
    rule : str
        One of `RULES`.
    where : str
        Kind and name, and the place in it.
    message : str
        What is wrong, and what to do.
    """

    rule: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.message}"


class Findings(tuple[Finding, ...]):
    """What `check` found, one a line; a table in a notebook."""

    __slots__ = ()

    def to_dict(self) -> list[dict[str, str]]:
        """Return plain values, ready for JSON."""
        return [asdict(each) for each in self]

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "nothing is wrong"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = [tuple(asdict(each).values()) for each in self]
        return html_table(f"{len(self)} finding(s)", ("rule", "where", "what"), cells)


RULES = {
    "schema": "it is what the API server takes: kinds, fields, types",
    "configmap-size": "a ConfigMap's data is 1 MiB at most",
    "mount": "no volume hides what the container runs, or makes a folder of it",
    "entry-point": "the command is a program and its arguments, and a module has a _start",
    "probes": "what runs on tells when it is ready, and that it lives",
    "resources": "memory and CPU have a request, memory has a limit",
    "memory": "the limit is not below what was measured",
    "image": "an image says which version",
    "security": "Kubernetes' restricted standard, and a root file system that is read only",
}
"""What is checked."""


def read(path: str | Path) -> list[Manifest]:
    """Read a file of manifests.

    Raises
    ------
    EdgelabError
        If it is no YAML, holds what is no manifest, is too large, or uses aliases: a few lines of
        them can mean gigabytes.
    """
    import yaml

    # libyaml's, where PyYAML has it: twenty times as fast.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
        if len(text) > _MAX_FILE_BYTES:
            raise EdgelabError(f"{path} has more than {_MAX_FILE_BYTES:,} bytes")
        if any(isinstance(each, yaml.AliasEvent) for each in yaml.parse(text, Loader=loader)):
            raise EdgelabError(f"{path} uses YAML's aliases (*name); write out what they stand for")
        found = [each for each in yaml.load_all(text, Loader=loader) if each is not None]
    except (OSError, ValueError) as error:
        raise EdgelabError(f"can't read {path}: {one_line(error)}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise EdgelabError(f"{path} is no YAML: {one_line(error)}") from None
    for each in found:
        if not isinstance(each, dict):
            raise EdgelabError(f"{path} holds {type(each).__name__}, which is no manifest")
    return found


def check(
    manifests: Sequence[Manifest],
    *,
    version: str = KUBERNETES,
    footprint: Footprint | None = None,
) -> Findings:
    """Check manifests that belong together.

    Parameters
    ----------
    manifests : sequence of dict
    version : str
        Kubernetes' version, such as ``"1.34"``.
    footprint : edgelab.deploy.Footprint, optional
        What the server was measured to need: limits below it are found.

    Returns
    -------
    Findings
        Empty if nothing is wrong.

    Raises
    ------
    EdgelabError
        If a package that the schemas come from is missing, or `version` is unknown.
    """
    _require_version(version)
    found: list[Finding] = []
    sound = []
    for manifest in manifests:
        problems = list(_schema_findings(manifest, version))
        found += problems
        if not problems:
            sound.append(manifest)
    # The rest reads manifests that have the right form. One that does not is looked at all the
    # same, as far as that goes: its reader wants all that is wrong with it.
    config_maps = {
        _name(each): _contents(each) for each in sound if each.get("kind") == "ConfigMap"
    }
    for manifest in sound:
        found += _configmap_findings(manifest, config_maps)
        found += _pod_findings(manifest, config_maps, footprint)
    return Findings(found)


def _name(manifest: Manifest) -> str:
    metadata = manifest.get("metadata")
    return str(metadata.get("name", "?")) if isinstance(metadata, dict) else "?"


def _where(manifest: Manifest, *place: object) -> str:
    return "/".join(map(str, (manifest.get("kind", "?"), _name(manifest), *place)))[:200]


# --- schemas --------------------------------------------------------------------------------------


def _schema_findings(manifest: Manifest, version: str) -> Iterator[Finding]:
    api, kind = manifest.get("apiVersion"), manifest.get("kind")
    # These become a file's name in the package of schemas.
    if not (
        isinstance(api, str)
        and isinstance(kind, str)
        and re.fullmatch(r"([a-z0-9][a-z0-9.-]{0,200}/)?v[a-z0-9]{1,30}", api)
        and re.fullmatch(r"[A-Za-z]{1,60}", kind)
    ):
        yield Finding("schema", "?", "apiVersion and kind don't name a kind of object")
        return
    if api.endswith(("serving.kserve.io/v1alpha1", "serving.kserve.io/v1beta1")):
        problem = _kserve_problem(api, kind, manifest, version)
    else:
        problem = _core_problem(manifest, version)
    if problem:
        yield Finding("schema", _where(manifest, *problem[0]), problem[1])


_Problem = tuple[Sequence[object], str]


def _require_version(version: str) -> None:
    try:
        from kubernetes_validate.utils import all_versions
    except ModuleNotFoundError:
        raise EdgelabError(
            "checking needs kubernetes-validate: pip install 'edgelab[deploy]'"
        ) from None
    known = [each.removesuffix(".0") for each in all_versions()]
    if version not in known:
        raise EdgelabError(
            f"there are no schemas for Kubernetes {version[:20]!r} here, but for {', '.join(known)}"
        )


def _core_problem(manifest: Manifest, version: str) -> _Problem | None:
    import kubernetes_validate

    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return list(error.absolute_path), one_line(Exception(error.message))
    except kubernetes_validate.SchemaNotFoundError:
        return (), f"Kubernetes {version} has no {manifest['apiVersion']} {manifest['kind']}"
    return None


def _kserve_problem(api: str, kind: str, manifest: Manifest, version: str) -> _Problem | None:
    import jsonschema

    if (api, kind) not in _GROUP_KINDS:
        return (), f"there is no schema for {api} {kind} here, so it can't be checked"
    validator = jsonschema.Draft202012Validator(kserve_schema(_GROUP_KINDS[api, kind], version))
    errors = sorted(validator.iter_errors(manifest), key=lambda error: -len(error.absolute_path))
    if not errors:
        return None
    return list(errors[0].absolute_path), one_line(Exception(errors[0].message))


@functools.cache
def kserve_schema(name: str, version: str = KUBERNETES) -> Mapping[str, Any]:
    """Return the JSON schema of a class of ``kserve.models``.

    KServe generates these classes from the definitions of its API: they say each field's name and
    type, and whether it must be there, but not which texts it takes. What they refer to of
    Kubernetes (containers, volumes, probes ...) is that package's own schema, in full.

    Raises
    ------
    EdgelabError
        If a package is missing.
    """
    try:
        from kubernetes_validate.utils import schema_contents
    except ModuleNotFoundError as error:
        raise EdgelabError(_MISSING.format(error.name)) from None
    classes = _kserve_classes()
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    core: dict[str, Any] = schema_contents(f"{folder}/_definitions.json", version)["$defs"]
    own: dict[str, Any] = {}

    def reference(kind: str) -> Any:
        if inner := re.fullmatch(r"list\[(.*)\]", kind):
            return {"type": "array", "items": reference(inner[1])}
        if inner := re.fullmatch(r"dict\(str, (.*)\)", kind):
            return {"type": "object", "additionalProperties": reference(inner[1])}
        if kind in _PLAIN:
            return _PLAIN[kind]
        if kind not in classes:
            short = kind.removeprefix("V1")
            known = [f"{group}.{short}" for group in _CORE if f"{group}.{short}" in core]
            return {"$ref": f"#/$defs/{known[0]}"} if known else {}  # {}: whatever it holds
        if kind not in own:
            own[kind] = {}  # some contain themselves
            fields = classes[kind]
            own[kind] = {
                "type": "object",
                "additionalProperties": False,
                "properties": {name: reference(inside) for name, (inside, _) in fields.items()},
                "required": [name for name, (_, required) in fields.items() if required],
            }
        return {"$ref": f"#/$defs/{kind}"}

    return {**reference(name), "$defs": {**core, **own}}


_CORE = ("io.k8s.api.core.v1", "io.k8s.apimachinery.pkg.apis.meta.v1")
_PLAIN = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "object": {},
    "K8sIoApiAppsV1DeploymentStrategy": {"$ref": "#/$defs/io.k8s.api.apps.v1.DeploymentStrategy"},
}


_MISSING = "KServe's schemas need {}: pip install 'edgelab[serve,deploy]'"


@functools.cache
def _kserve_classes() -> dict[str, dict[str, tuple[str, bool]]]:
    """Class of ``kserve.models`` → name of a field → its type, and whether it must be there.

    Read by a process of its own: once kserve is imported, tritonclient can't be (both register
    the same protocol), and kserve parses the command line as if every program were its server.
    """
    if importlib.util.find_spec("kserve") is None:
        raise EdgelabError(_MISSING.format("kserve"))
    command = [sys.executable, "-c", _PRINT_CLASSES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EdgelabError(f"kserve's classes can't be read: {one_line(Exception(last))}")
    classes: dict[str, dict[str, tuple[str, bool]]] = json.loads(done.stdout.splitlines()[-1])
    return classes


_PRINT_CLASSES = """
import json
from kserve import models

class Strict:
    client_side_validation = True

def required(kind, field):
    "Whether a generated class refuses to have a field set to nothing."
    empty = object.__new__(kind)
    empty.local_vars_configuration = Strict
    try:
        setattr(empty, field, None)
    except ValueError:
        return True
    return False

print(json.dumps({
    name: {
        kind.attribute_map[field]: (inside, required(kind, field))
        for field, inside in kind.openapi_types.items()
    }
    for name, kind in vars(models).items() if hasattr(kind, "openapi_types")
}))
"""


# --- what schemas don't see -----------------------------------------------------------------------


def _contents(config_map: Manifest) -> dict[str, bytes]:
    """File name → bytes."""
    found = {key: value.encode() for key, value in (config_map.get("data") or {}).items()}
    for key, value in (config_map.get("binaryData") or {}).items():
        try:
            found[key] = base64.b64decode(value)
        except binascii.Error:
            found[key] = value.encode()
    return found


def _configmap_findings(
    manifest: Manifest, config_maps: Mapping[str, Mapping[str, bytes]]
) -> Iterator[Finding]:
    if manifest["kind"] != "ConfigMap":
        return
    size = sum(map(len, config_maps[_name(manifest)].values()))
    if size > CONFIGMAP_BYTES:
        yield Finding(
            "configmap-size",
            _where(manifest),
            f"{size:,} bytes, and the API server takes {CONFIGMAP_BYTES:,}. Bring files of this "
            "size by an image or an init container; a ConfigMap can hold their sha256",
        )


def _pod(manifest: Manifest) -> Manifest:
    """The pod that a manifest makes; empty if it makes none."""
    spec: Any = manifest.get("spec") or {}
    kind = manifest["kind"]
    if kind == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    if kind in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job", "CronJob"):
        spec = spec["template"]["spec"]
    elif kind not in ("Pod", "ServingRuntime"):
        return {}
    return dict(spec)


def _pod_findings(
    manifest: Manifest,
    config_maps: Mapping[str, Mapping[str, bytes]],
    footprint: Footprint | None,
) -> Iterator[Finding]:
    pod = _pod(manifest)
    kind = manifest["kind"]
    runs_on = kind in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "ServingRuntime")
    for helper, place in ((True, "initContainers"), (False, "containers")):
        for container in pod.get(place) or ():
            files = _mounted(container, pod, config_maps)
            where = _where(manifest, container["name"])
            problems = [
                *_mount_problems(container, files),
                *_entry_problems(container, files),
                *_image_problems(container),
                *_resource_problems(container, footprint if runs_on and not helper else None),
                # KServe takes the pod's security from the InferenceService.
                *_security_problems(container, pod, pod_too=kind != "ServingRuntime"),
            ]
            if runs_on and not helper:
                problems += _probe_problems(container)
            for rule, message in problems:
                yield Finding(rule, where, message)


_Problems = Iterator[tuple[str, str]]


def _mounted(
    container: Manifest, pod: Manifest, config_maps: Mapping[str, Mapping[str, bytes]]
) -> dict[str, dict[str, bytes] | None]:
    """Mount path → the files that a volume puts there; None if that is not known from here."""
    volumes = {volume["name"]: volume for volume in pod.get("volumes") or ()}
    found: dict[str, dict[str, bytes] | None] = {}
    for mount in container.get("volumeMounts") or ():
        volume = volumes.get(mount["name"], {})
        source = volume.get("configMap") or {}
        held = config_maps.get(source.get("name", ""))
        path = posixpath.normpath(mount["mountPath"])
        if held is None or mount.get("subPath"):
            found[path] = {} if "emptyDir" in volume and not mount.get("subPath") else None
        else:
            items = {item["key"]: item["path"] for item in source.get("items") or ()}
            found[path] = {
                posixpath.join(path, items.get(key, key)): value
                for key, value in held.items()
                if not items or key in items
            }
    return found


def _words(container: Manifest) -> list[str]:
    return [*(container.get("command") or ()), *(container.get("args") or ())]


def _mount_problems(
    container: Manifest, files: Mapping[str, Mapping[str, bytes] | None]
) -> _Problems:
    paths = [mount["mountPath"] for mount in container.get("volumeMounts") or ()]
    for path in {path for path in paths if paths.count(path) > 1}:
        yield "mount", f"two volumes are mounted at {path}"
    for word in _words(container):
        if not word.startswith("/"):
            continue
        for path, held in files.items():
            if held is None:
                continue
            if word == path:
                yield (
                    "mount",
                    f"the volume makes a folder of {path}, which the command takes for a file. "
                    "Mount the folder above it, at a path that the image does not use",
                )
            elif word.startswith(path.rstrip("/") + "/") and word not in held:
                yield (
                    "mount",
                    f"the volume at {path} hides what the image has there, and holds no {word}",
                )


def _entry_problems(
    container: Manifest, files: Mapping[str, Mapping[str, bytes] | None]
) -> _Problems:
    words = _words(container)
    command = container.get("command") or ()
    if command and re.search(r"\s", command[0].strip()):
        yield "entry-point", f"no program is named {command[0]!r}: make each word an item"
    modules = {path: data for held in files.values() for path, data in (held or {}).items()}
    for word in words:
        # A file that is mounted over itself is still the one that was meant.
        data = modules.get(word) or modules.get(posixpath.join(word, posixpath.basename(word)))
        if data is None or not data.startswith(b"\0asm"):
            continue
        try:
            exports = interface(data).exports
        except GuestError as error:
            yield "entry-point", f"{word}: {error}"
            continue
        if "_start" not in exports and "--reactor" not in words:
            named = ", ".join(name for name in exports if name != "memory") or "nothing"
            yield (
                "entry-point",
                f"{word} has no _start, so there is nothing to run: it is a library that exports "
                f"{named[:120]}. A host must call these, or build a program (a bin, not a cdylib)",
            )


def _image_problems(container: Manifest) -> _Problems:
    if "image" in container:
        try:
            check_image(container["image"])
        except EdgelabError as error:
            yield "image", str(error)


def _resource_problems(container: Manifest, footprint: Footprint | None) -> _Problems:
    resources = container.get("resources") or {}
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    missing = [f"requests.{each}" for each in ("cpu", "memory") if each not in requests]
    if "memory" not in limits:
        missing.append("limits.memory")
    if missing:
        yield "resources", f"{', '.join(missing)} missing: one pod could take a node's memory"
    elif footprint is not None and (limit := quantity(limits["memory"])) < footprint.worst_bytes:
        yield (
            "memory",
            f"limit {limits['memory']}, and the server was seen with "
            f"{footprint.idle_bytes / (1 << 20):.0f} MiB idle and "
            f"{footprint.worst_bytes / (1 << 20):.0f} MiB at most: it "
            + ("never starts" if limit < footprint.idle_bytes else "is killed by a large request"),
        )


def quantity(text: str | float) -> float:
    """Return a quantity of Kubernetes, such as ``"128Mi"``, as a number.

    Raises
    ------
    EdgelabError
        If it is none.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?", str(text))
    if found is None:
        raise EdgelabError(f"{str(text)[:40]!r} is no quantity, such as 128Mi or 500m")
    return float(found[1]) * _UNITS[found[2]]


_UNITS = {
    None: 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50,
}  # fmt: skip


def _probe_problems(container: Manifest) -> _Problems:
    missing = [each for each in ("readinessProbe", "livenessProbe") if each not in container]
    if missing:
        yield (
            "probes",
            f"no {' and no '.join(missing)}: it gets requests before it is ready, and nobody "
            "notices when it hangs",
        )


def _security_problems(container: Manifest, pod: Manifest, *, pod_too: bool) -> _Problems:
    own = container.get("securityContext") or {}
    shared = (pod.get("securityContext") or {}) if pod_too else {}
    bad = []
    if own.get("privileged"):
        bad.append("is privileged")
    if own.get("allowPrivilegeEscalation") is not False:
        bad.append("may gain privileges (allowPrivilegeEscalation)")
    if "ALL" not in ((own.get("capabilities") or {}).get("drop") or ()):
        bad.append("keeps capabilities (capabilities.drop: [ALL])")
    if own.get("readOnlyRootFilesystem") is not True:
        bad.append("can write to its image (readOnlyRootFilesystem)")
    if pod_too and not own.get("runAsNonRoot", shared.get("runAsNonRoot")):
        bad.append("may be root (runAsNonRoot)")
    seccomp = own.get("seccompProfile") or shared.get("seccompProfile") or {}
    if pod_too and seccomp.get("type") not in ("RuntimeDefault", "Localhost"):
        bad.append("may make any system call (seccompProfile)")
    bad += [f"shares the node's {key[4:]}" for key in _SHARED if pod_too and pod.get(key)]
    if bad:
        yield "security", "; ".join(bad)


_SHARED = ("hostNetwork", "hostPID", "hostIPC")
