"""Real photos and a real ImageNet model through the whole path; the data are not part of this."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edgelab import models
from edgelab.images import decode
from edgelab.models import Spec, read_synset_labels
from edgelab.paths import source_root
from edgelab.pipeline import Pipeline
from edgelab.preprocess import preprocess
from edgelab.wasinn.backends.onnx import session_options

REAL = Path(source_root() or ".").parent / "shared" / "real"
pytestmark = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"needs the real photos and models in {REAL}, which do not ship"
)

FILES = {"fp32": "mobilenetv2-fp32-rebuilt.onnx", "int8": "mobilenetv2-12-int8.onnx"}
PHOTOS = {
    "dog.jpg": "golden retriever",
    "finch.jpeg": "house finch",
    "kitten.png": "tabby",
    "photo-0.jpg": "American egret",
    "photo-1.jpg": "banana",
    "photo-2.jpg": "pizza",
    "photo-3.jpg": "street sign",
    "photo-4.jpg": "electric locomotive",
}
# Top-1 on imagenet-200 with bare ONNX Runtime, as published with the photos, in percent.
BARE_TOP1 = {"fp32": 84.5, "int8": 80.5}
# The inputs differ by float32 rounding only. INT8 can round such a difference up to a whole step.
LOGITS_BOUND = {"fp32": 1e-4, "int8": 0.5}


@pytest.fixture(scope="module", params=["fp32", "int8"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(precision: str) -> Pipeline:
    spec = Spec(
        name=f"mobilenetv2-{precision}",
        version="12",
        labels=read_synset_labels(REAL / "imagenet-synsets.txt"),
        resize=256,
        crop=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    return Pipeline(models.load(REAL / FILES[precision], spec=spec))


def test_every_photo_gets_its_label(pipeline: Pipeline) -> None:
    seen = {name: pipeline.classify(REAL / "photos" / name).label for name in PHOTOS}
    assert seen == PHOTOS


def test_imagenet_200_scores_as_bare_onnx_runtime(pipeline: Pipeline, precision: str) -> None:
    wnids = [line.split()[0] for line in (REAL / "imagenet-synsets.txt").read_text().splitlines()]
    bare = onnxruntime.InferenceSession(
        pipeline.model.data, session_options(), providers=["CPUExecutionProvider"]
    )
    photos = sorted((REAL / "imagenet-200").iterdir())
    assert len(photos) == 200
    right = agreeing = 0
    largest = 0.0
    for photo in photos:
        logits = pipeline.logits(photo)
        expected = bare.run(None, {"input": preprocess(decode(photo), pipeline.model.spec)})[0][0]
        right += wnids[int(np.argmax(logits))] == photo.stem
        agreeing += int(np.argmax(logits)) == int(np.argmax(expected))
        largest = max(largest, float(np.abs(logits - expected).max()))
    print(f"{precision}: top-1 {right / 2} %, agreement {agreeing / 2} %, logits {largest:.1e}")
    assert abs(right / 2 - BARE_TOP1[precision]) <= 1
    assert agreeing >= 199
    assert largest <= LOGITS_BOUND[precision]
