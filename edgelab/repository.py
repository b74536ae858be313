"""Models by name, loaded on first use and unloaded when they take too much memory."""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cachetools

from edgelab import models
from edgelab.errors import ModelError
from edgelab.pipeline import Pipeline

MAX_REQUEST_BYTES = 16 << 20
"""How large a request to a server may be, unless told."""


class Repository(Mapping[str, Pipeline]):
    """Pipelines by model name; the least recently used are unloaded beyond `max_bytes`.

    Parameters
    ----------
    sources : mapping of str to (str, pathlib.Path or edgelab.models.Model)
        Under which name to offer which model: what `Pipeline` takes.
    max_bytes : int
        How many bytes of model files may be loaded at a time. A session needs more than its
        file; ``python -m edgelab evaluate`` shows how much.
    options : keyword arguments
        For each `Pipeline`: ``kernel``, ``threads``, ``limits``.

    Notes
    -----
    Threads may share a repository, but not a pipeline: take a `Pipeline.replica` or a `Pool`.
    Whoever still holds an unloaded pipeline can go on with it; its memory is given back after that.

    Examples
    --------
    >>> repository = Repository({"signs": "signs"}, max_bytes=100_000_000)
    >>> repository.loaded
    {}
    >>> repository["signs"]
    Pipeline('signs', kernel='simd128')
    >>> repository.loaded
    {'signs': 9027784}
    """

    def __init__(
        self,
        sources: Mapping[str, str | Path | models.Model],
        *,
        max_bytes: int = 512 << 20,
        **options: Any,
    ) -> None:
        self._sources, self._options = dict(sources), options
        self._loaded: cachetools.LRUCache[str, Pipeline] = cachetools.LRUCache(
            max_bytes, getsizeof=lambda pipeline: len(pipeline.model.data)
        )
        self._lock = threading.Lock()
        self._loading: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def __getitem__(self, name: str) -> Pipeline:
        """Return the pipeline of a model, loading it if it is not loaded.

        Raises
        ------
        KeyError
            If no model has this name.
        ModelError
            If it does not load, or is larger than `max_bytes`.
        """
        source = self._sources[name]
        with self._lock:
            if name in self._loaded:
                return self._loaded[name]
            loading = self._loading[name]
        with loading:  # once, and without keeping users of other models waiting
            with self._lock:
                if name in self._loaded:
                    return self._loaded[name]
            pipeline = Pipeline(source, **self._options)
            size = len(pipeline.model.data)
            with self._lock:
                try:
                    self._loaded[name] = pipeline
                except ValueError:
                    raise ModelError(
                        f"model {name!r} has {size:,} bytes, and this repository holds at most "
                        f"{int(self._loaded.maxsize):,}: raise max_bytes"
                    ) from None
            return pipeline

    def ready(self, name: str) -> Pipeline | None:
        """Return the pipeline of a model if it is loaded, and count that as a use of it."""
        with self._lock:
            return self._loaded.get(name)

    def unload(self, name: str) -> bool:
        """Unload a model; False if it was not loaded.

        Raises
        ------
        KeyError
            If no model has this name.
        """
        self._sources[name]
        with self._lock:
            return self._loaded.pop(name, None) is not None

    @property
    def loaded(self) -> dict[str, int]:
        """Bytes by name of the models that are loaded."""
        look = functools.partial(cachetools.Cache.__getitem__, self._loaded)  # that is no use
        with self._lock:
            return {name: len(look(name).model.data) for name in self._loaded}

    def __contains__(self, name: object) -> bool:  # Mapping's would load the model
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __repr__(self) -> str:
        return f"Repository({list(self._sources)}, loaded={list(self.loaded)})"
