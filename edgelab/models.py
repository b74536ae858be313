"""Models by name: what ships, what can be downloaded, and how each one wants to be fed.

A `Spec` travels in the model's own metadata (ONNX ``metadata_props``, safetensors
``__metadata__``). Without it a model can't be used: guessing a layout gives silent nonsense.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelab.errors import DownloadError, ModelError, one_line
from edgelab.paths import PACKAGE, cache_dir, source_root

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_MODEL_BYTES = 2 << 30
TIMEOUT_S = (10.0, 30.0)
"""For a download: to connect, and between two packets."""


@dataclass(frozen=True, slots=True)
class Spec:
    """How to turn an image into a model's input, and its output into labels.

    Attributes
    ----------
    name, version : str
    labels : tuple of str
        Label of class ``k`` at place ``k``.
    resize, crop : int
        Pixels: shorter side after resizing, side of the centre crop.
    mean, std : tuple of float
        Per channel, for pixels scaled to 0 … 1.
    layout, color, output : str
        ``"NCHW"``, ``"RGB"`` and ``"logits"``; nothing else is supported yet.

    Raises
    ------
    ModelError
        If the values contradict each other, are not supported, or are not fit to print.
    """

    name: str
    version: str
    labels: tuple[str, ...]
    resize: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layout: str = "NCHW"
    color: str = "RGB"
    output: str = "logits"

    def __post_init__(self) -> None:
        problems = []
        texts = (self.name, *self.labels)
        if not self.labels or not all(texts) or not all(map(_printable, (*texts, self.version))):
            problems.append("name, version and labels must be text that can be printed")
        if not 1 <= self.crop <= self.resize <= 4096:
            problems.append(f"need 1 <= crop <= resize <= 4096, got {self.crop} and {self.resize}")
        # The kernels compute in float32: within these bounds they can't overflow.
        if len(self.mean) != 3 or not all(abs(m) <= 1e6 for m in self.mean):
            problems.append(f"mean {self.mean} must be 3 numbers between -1e6 and 1e6")
        if len(self.std) != 3 or not all(1e-6 <= s <= 1e6 for s in self.std):
            problems.append(f"std {self.std} must be 3 numbers between 1e-6 and 1e6")
        if (self.layout, self.color, self.output) != ("NCHW", "RGB", "logits"):
            problems.append(
                "only NCHW, RGB and logits are supported, "
                f"not {self.layout!r:.20}, {self.color!r:.20} and {self.output!r:.20}"
            )
        if problems:
            raise ModelError(f"the spec of model {self.name!r:.80}: " + "; ".join(problems))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Spec:
        """Read a spec from a model's metadata, where every value is text.

        Raises
        ------
        ModelError
            If a key is missing or a value makes no sense.
        """
        if not isinstance(metadata, Mapping) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise ModelError("the model's metadata is not a table of texts, so it can't be read")
        missing = [
            k for k in ("name", "labels", "resize", "crop", "mean", "std") if k not in metadata
        ]
        if missing:
            raise ModelError(
                f"the model's metadata lacks {', '.join(missing)}, so its input can't be prepared. "
                "Pass a Spec, or add the keys as models/README.md shows"
            )
        try:
            return cls(
                name=metadata["name"],
                version=metadata.get("version", "0"),
                labels=tuple(_json_list(metadata["labels"])),
                resize=int(metadata["resize"]),
                crop=int(metadata["crop"]),
                mean=_three(_json_list(metadata["mean"])),
                std=_three(_json_list(metadata["std"])),
                layout=metadata.get("layout", "NCHW"),
                color=metadata.get("color", "RGB"),
                output=metadata.get("output", "logits"),
            )
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ModelError(f"the model's metadata can't be read: {error!s:.200}") from None

    def to_metadata(self) -> dict[str, str]:
        """Return what `from_metadata` reads: every value as text."""
        return {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True, slots=True)
class Model:
    """A model file that was checked against its pin, with its spec.

    Attributes
    ----------
    path : pathlib.Path
    data : bytes
        The whole file.
    sha256 : str
    spec : Spec
    """

    path: Path
    data: bytes
    sha256: str
    spec: Spec

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return (
            f"Model({self.spec.name!r}, {self.size_bytes:,} bytes, {len(self.spec.labels)} labels, "
            f"sha256 {self.sha256[:12]}…)"
        )


def models_dir() -> Path:
    """The folder with ``registry.toml``: in the checkout, or inside the installed package."""
    root = source_root()
    return root / "models" if root else PACKAGE / "_models"


def example_image() -> Path:
    """Path of the picture that ships with the embedded model: a rendered sign, JPEG."""
    return models_dir() / "signs" / "example.jpg"


@functools.cache
def _registry_file() -> dict[str, dict[str, Any]]:
    with open(models_dir() / "registry.toml", "rb") as file:
        entries: dict[str, dict[str, Any]] = tomllib.load(file)
        return entries


def registry() -> dict[str, dict[str, Any]]:
    """Return ``models/registry.toml``: name → title, license, sha256, size_bytes, path or urls."""
    return {name: entry for name, entry in _registry_file().items() if not name.startswith("_")}


def names() -> list[str]:
    """Names of the known models."""
    return list(registry())


def load(name: str | Path = "signs", *, spec: Spec | None = None) -> Model:
    """Load a model by its registry name, or from a file of your own.

    Parameters
    ----------
    name : str or pathlib.Path
        A registry name (downloaded on first use if it does not ship), or a path to a ``.onnx`` or
        ``.safetensors`` file.
    spec : Spec, optional
        How to feed it; needed if the file's metadata does not say.

    Raises
    ------
    ModelError
        If the file is missing, is not the pinned one, or has no usable spec.
    DownloadError
        If a download failed.
    """
    entry = registry().get(str(name))
    path = fetch(str(name)) if entry else Path(name)
    data = read_file(path)
    digest = hashlib.sha256(data).hexdigest()
    if entry:
        _require_pin(path, data, digest, entry)
    if spec is None:
        spec = _registry_spec(str(name), entry) if entry and "spec" in entry else read_spec(data)
    return Model(path, data, digest, spec)


def read_file(path: str | Path, *, max_bytes: int = MAX_MODEL_BYTES) -> bytes:
    """Read a model's file, if it is not too large.

    Raises
    ------
    ModelError
        If it is, or can't be read.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise ModelError(f"{path} has {size:,} bytes; {max_bytes:,} are the limit here")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ModelError(
            f"no model {str(path)!r:.200}: {reason}. Known names: {', '.join(names())}; or give "
            "the path of a file"
        ) from None


def read_spec(data: bytes) -> Spec:
    """Read the spec that a model file carries (ONNX or safetensors).

    Raises
    ------
    ModelError
        If the file has no or wrong metadata.
    """
    from edgelab.wasinn.backends.onnx import looks_like_onnx, onnx_metadata

    if looks_like_onnx(data):
        return Spec.from_metadata(onnx_metadata(data))
    # safetensors: the header's length (8 bytes, little-endian), then a JSON header
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(len(data) - 8, 1 << 20):
        raise ModelError("neither an ONNX nor a safetensors file: damaged, or another format")
    try:
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"damaged safetensors header: {error}") from None
    return Spec.from_metadata(metadata)


def fetch(name: str, *, progress: bool | None = None) -> Path:
    """Return the path of a registered model's file, downloading it on first use.

    Parameters
    ----------
    name : str
        A registry name, see `names`.
    progress : bool, optional
        Show a progress bar; the default is yes if stderr is a terminal.

    Raises
    ------
    DownloadError
        If no URL gave the pinned bytes. What was there before is left as it was.
    ModelError
        If there is no model of this name.
    """
    entry = registry().get(name)
    if entry is None:
        raise ModelError(f"no model is named {name!r}; known: {', '.join(names())}")
    if "path" in entry:
        return models_dir() / str(entry["path"])
    return download(entry, name + Path(entry["urls"][0]).suffix, progress=progress)


def download(
    entry: Mapping[str, Any],
    filename: str,
    *,
    folder: str = "models",
    progress: bool | None = None,
    resume: bool = False,
) -> Path:
    """Fetch a pinned file into the cache: retried, checked, and renamed into place when complete.

    Parameters
    ----------
    entry : mapping
        ``urls`` (tried in order), ``sha256`` or else ``md5``, and ``size_bytes``.
    filename : str
        Name in the cache.
    folder : str
        Folder in the cache.
    progress : bool, optional
        Show a progress bar; the default is yes if stderr is a terminal.
    resume : bool
        Keep what arrived of a file, and go on from there next time, if the server can. For large
        files, and by one process at a time.

    Raises
    ------
    DownloadError
        If no URL gave the pinned bytes.
    """
    import pooch

    where = cache_dir() / folder
    part = where / f".{filename}.part" if resume else None
    pin = f"sha256:{entry['sha256']}" if "sha256" in entry else f"md5:{entry['md5']}"
    tried = []
    for url in entry["urls"]:
        source = pooch.create(
            where,
            base_url="",
            registry={filename: pin},
            urls={filename: url},
            retry_if_failed=2,
        )
        pooch.get_logger().setLevel("WARNING")
        shown = sys.stderr.isatty() if progress is None else progress
        downloader = _Downloader(filename, entry["size_bytes"], shown, part)
        try:
            return Path(source.fetch(filename, downloader=downloader))
        except (OSError, ValueError, DownloadError) as error:  # requests' are OSErrors
            tried.append(f"{url}: {one_line(error)}")
    raise DownloadError(
        f"could not download {filename} ({entry['size_bytes']:,} bytes):\n  "
        + "\n  ".join(tried)
        + f"\nCheck the network, or put the file there yourself: {where / filename}"
    )


class _Downloader:
    """A pooch downloader that stops a server which sends too much or nothing at all."""

    def __init__(
        self, name: str, size_bytes: int, progress: bool, part: Path | None = None
    ) -> None:
        self._name, self._size, self._progress, self._part = name, size_bytes, progress, part

    def __call__(self, url: str, output: Any, _pooch: Any) -> None:
        if self._part is None:
            self._fetch(url, Path(output), 0)
            return
        have = self._part.stat().st_size if self._part.is_file() else 0
        if have < self._size:
            self._fetch(url, self._part, have)
        os.replace(self._part, output)  # pooch checks it; if it is wrong, the next try is new

    def _fetch(self, url: str, target: Path, have: int) -> None:
        """Append to `target` from byte `have` on, or write it anew if the server can't."""
        import requests
        from tqdm.auto import tqdm

        headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"} if have else {}
        with requests.get(url, stream=True, timeout=TIMEOUT_S, headers=headers) as response:
            if response.status_code in (401, 403, 404, 410):  # asking again would not help
                raise DownloadError(f"the server answers {response.status_code} {response.reason}")
            if response.status_code == 416 and have:  # our part is no beginning of its file
                target.unlink()
            response.raise_for_status()
            begins = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            received = have if response.status_code == 206 and begins else 0
            if response.status_code == 206 and received != have:
                raise ValueError("the server sends another part than the one asked for")
            self._save(response, target, received, tqdm)

    def _save(self, response: Any, target: Path, received: int, tqdm: Any) -> None:
        with (
            open(target, "ab" if received else "wb") as file,
            tqdm(
                total=self._size,
                initial=received,
                unit="B",
                unit_scale=True,
                desc=self._name,
                disable=not self._progress,
            ) as bar,
        ):
            for chunk in response.iter_content(1 << 16):
                received += len(chunk)
                if received > self._size:
                    file.truncate(0)
                    raise DownloadError(f"the server sends more than the {self._size:,} bytes")
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            if received < self._size:
                # A ValueError is what pooch retries, as it does for a wrong hash.
                raise ValueError(f"cut off after {received:,} of {self._size:,} bytes")


def _registry_spec(name: str, entry: Mapping[str, Any]) -> Spec:
    facts = dict(_registry_file()["_specs"][entry["spec"]])
    labels = read_synset_labels(download(facts.pop("labels"), f"{entry['spec']}-labels.txt"))
    mean, std = _three(facts.pop("mean")), _three(facts.pop("std"))
    return Spec(name, "1", labels, mean=mean, std=std, **facts)


def imagenet_spec(name: str, synsets: Path) -> Spec:
    """Return how ImageNet models are fed, with the labels of a file.

    For a model that says nothing about itself: 256, crop 224, ImageNet's mean and deviation.

    Parameters
    ----------
    name : str
        Name of the model.
    synsets : pathlib.Path
        Lines such as ``n01440764 tench, Tinca tinca``, line ``k`` for class ``k``.

    Raises
    ------
    ModelError
        If the file is no such list.
    """
    read_synset_ids(synsets)
    facts = dict(_registry_file()["_specs"]["imagenet"])
    del facts["labels"]
    mean, std = _three(facts.pop("mean")), _three(facts.pop("std"))
    return Spec(name, "1", read_synset_labels(synsets), mean=mean, std=std, **facts)


def imagenet_synsets(*, progress: bool | None = None) -> Path:
    """Return the list of ImageNet's classes, with their WordNet ids; downloaded on first use.

    Raises
    ------
    DownloadError
        If it can't be downloaded.
    """
    entry = _registry_file()["_specs"]["imagenet"]["labels"]
    return download(entry, "imagenet-labels.txt", progress=progress)


def pinned_dataset(name: str) -> Mapping[str, Any]:
    """Return a data set's entry in ``models/registry.toml``: where it is, its pin and its size."""
    entry: Mapping[str, Any] = _registry_file()["_datasets"][name]
    return entry


_MAX_SYNSET_BYTES = 1 << 20
_SYNSET = re.compile(r"(n\d{8}) \S.*")


def read_synset_ids(path: Path) -> tuple[str, ...]:
    """Read the WordNet ids from lines such as ``n01440764 tench, Tinca tinca``.

    Raises
    ------
    ModelError
        If the file can't be read, or a line is of another form.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SYNSET_BYTES + 1)
        lines = data.decode().splitlines()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ModelError(f"cannot read the list of labels {path}: {reason}") from None
    found = [_SYNSET.fullmatch(line) for line in lines]
    ids = tuple(match.group(1) for match in found if match)
    if (
        not ids
        or len(ids) < len(found)
        or len(set(ids)) < len(ids)
        or len(data) > _MAX_SYNSET_BYTES
    ):
        raise ModelError(
            f"{path} is no list of labels: need lines such as 'n01440764 tench, Tinca tinca', each "
            "id once"
        )
    return ids


def read_synset_labels(path: Path) -> tuple[str, ...]:
    """Read labels from lines such as ``n01440764 tench, Tinca tinca``; the first name counts."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(line.split(" ", 1)[1].split(",")[0] for line in lines)


def _require_pin(path: Path, data: bytes, digest: str, entry: Mapping[str, Any]) -> None:
    if digest != entry["sha256"]:
        raise ModelError(
            f"{path} is not the pinned file: sha256 {digest[:12]}…, want {entry['sha256'][:12]}…, "
            f"{len(data):,} bytes, want {entry['size_bytes']:,}. Restore it: git checkout -- "
            "models, or install edgelab again"
        )


def _printable(text: object) -> bool:
    # Not printable: control characters, so escape sequences too, and halves of surrogate pairs.
    return isinstance(text, str) and text.isprintable()


def _json_list(text: str) -> list[Any]:
    values = json.loads(text)
    if not isinstance(values, list):
        raise ValueError(f"need a JSON list, got {text:.50}")
    return values


def _three(values: list[Any]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ValueError(f"need three channels, got {len(values)}")
    red, green, blue = (float(v) for v in values)
    return red, green, blue
