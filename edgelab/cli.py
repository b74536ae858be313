"""The command line. Each command is a thin line over the package."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from edgelab import __version__
from edgelab.errors import EdgelabError

if TYPE_CHECKING:
    from edgelab.results import Results, Section

_EPILOG = """\
examples:
  python -m edgelab run                          the article's path, end to end
  python -m edgelab classify photo.jpg --top 5   what is in a picture
  python -m edgelab classify *.jpg --json        the same for programs, one line a picture
  python -m edgelab classify dog.jpg --model mobilenetv2-12
  python -m edgelab quantize photos.onnx --calibrate DIR   a quarter of the bytes
  python -m edgelab evaluate signs --to fp16 --to int8     what quantizing costs and saves
  python -m edgelab waterfall                    from the article's 100 to its 10, step by step
  python -m edgelab deploy signs                 manifests, with limits that were measured
  python -m edgelab rivals                       the same model in C++, Go, Rust, Node, WasmEdge
  python -m edgelab doctor                       what is wrong here, and the cure
  cargo build 2>&1 | python -m edgelab doctor -  what such a message means
  python -m edgelab serve signs                  a service; with a page for browsers
  python -m edgelab load --compare               what it stands, beside another server
  python -m edgelab inspect guest.wasm           what a module is, and whether it runs here

environment:
  EDGELAB_CACHE       folder for machine code and downloads (default: the user's cache folder)
  EDGELAB_TOKEN       what clients of `serve` must send (default: nothing)
  EDGELAB_TOOLCHAIN   force installed, rustup, apt, debootstrap or prebuilt

exit codes: 0 all right, 1 failed (the reason is on stderr), 2 wrong usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = _show_warning
    try:
        code: int = options.command(options)
        sys.stdout.flush()
        return code
    except EdgelabError as error:
        print(f"edgelab: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("edgelab: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` closed its end; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgelab",
        description="Run Rust/Wasm guests with WASI-NN from Python, and measure what that costs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edgelab {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(command=run)
        return sub

    run = command("run", _run, "build the guests, classify a picture, and show the stage table")
    _model_options(run)
    run.add_argument("--image", type=Path, help="picture to classify (default: the shipped sign)")
    run.add_argument("--repeats", type=_positive, default=50, help="paired rounds (default: 50)")
    run.add_argument("--plot", type=Path, metavar="FILE", help="also draw the result as a PNG")

    classify = command("classify", _classify, "classify pictures")
    _model_options(classify)
    classify.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG, WebP, ...")
    classify.add_argument("--top", type=_positive, default=3, help="labels a picture (default: 3)")
    classify.add_argument(
        "--kernel",
        choices=("scalar", "simd128", "relaxed_simd"),
        default="simd128",
        help="normalise kernel in the guest (default: simd128)",
    )
    classify.add_argument("--json", action="store_true", help="one JSON object a picture and line")

    doctor = command(
        "doctor", _doctor, "say what is wrong, with this machine or with files, and how to mend it"
    )
    doctor.add_argument(
        "files", nargs="*", metavar="FILE",
        help="a module, machine code, a model, a JSON request, or what a program printed; - is "
        "standard input (default: check this machine)",
    )  # fmt: skip
    doctor.add_argument("--table", action="store_true", help="the fifteen failures, in Markdown")
    doctor.add_argument(
        "--json", action="store_true", help="a JSON list; of files, one object a file and line"
    )

    inspect = command(
        "inspect", _inspect, "say what a .wasm file is, what it wants, and whether it runs here"
    )
    inspect.add_argument("files", nargs="+", metavar="FILE", help="a module or a component")
    inspect.add_argument("--json", action="store_true", help="one JSON object a file and line")
    inspect.add_argument("--functions", action="store_true", help="with a line for each function")

    batch = command("batch", _batch, "classify a folder of pictures, on all cores or a Ray cluster")
    batch.add_argument("folder", type=Path, metavar="DIR", help="pictures, or folders of them")
    batch.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the results; a run that was stopped goes on there",
    )
    batch.add_argument("--model", default="signs", help="registry name or ONNX file")
    batch.add_argument(
        "--truth", action="store_true", help="the folders' names are classes: count what is right"
    )
    batch.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="ImageNet's list of classes: feed the model as usual for ImageNet",
    )
    batch.add_argument("--workers", type=_positive, help="threads (default: the cores)")
    batch.add_argument(
        "--ray", metavar="ADDRESS", help="'local' starts a cluster here, 'auto' or HOST:PORT joins"
    )
    batch.add_argument("--chunk", type=_positive, default=64, help="pictures a chunk (default: 64)")
    batch.add_argument("--json", action="store_true", help="the summary as one JSON object")

    evaluate = command(
        "evaluate", _evaluate, "compare models: accuracy in pairs, with intervals; size and speed"
    )
    evaluate.add_argument(
        "models", nargs="+", metavar="MODEL", help="names from `models list`, or ONNX files"
    )
    evaluate.add_argument(
        "--baseline", metavar="MODEL", help="what the others are compared with (default: the first)"
    )
    evaluate.add_argument(
        "--images", type=Path, metavar="DIR",
        help="DIR/CLASS/*.jpg or DIR/CLASS.jpg; a class by its label or WordNet id (default: for "
        "the models that ship, renders that were held out)",
    )  # fmt: skip
    evaluate.add_argument(
        "--imagenette", nargs="?", const="320px", choices=("160px", "320px"), metavar="SIZE",
        help="score ImageNet models on its 3,925 pictures: downloads 342 MB (160px: 99 MB)",
    )  # fmt: skip
    evaluate.add_argument(
        "--labels", type=Path, metavar="FILE",
        help="ImageNet's list of classes, for models that do not carry their labels",
    )  # fmt: skip
    evaluate.add_argument(
        "--count", type=_positive, metavar="N", help="pictures (default: all, or 2,048 renders)"
    )
    evaluate.add_argument(
        "--to", action="append", default=[], metavar="SCHEME",
        help="also quantize the first model, e.g. int8; may be given several times",
    )  # fmt: skip
    evaluate.add_argument(
        "--folds", type=_positive, metavar="K",
        help="for --to with --images: calibrate on K - 1 parts of the pictures and score on the "
        "other part, K times",
    )  # fmt: skip
    evaluate.add_argument(
        "--calibrate", type=_positive, default=256, metavar="N",
        help="for --to: pictures to calibrate with (default: 256)",
    )  # fmt: skip
    evaluate.add_argument(
        "--backend", action="append", choices=("onnxruntime", "openvino"),
        help="may be given twice; the first one computes the accuracy (default: onnxruntime)",
    )  # fmt: skip
    evaluate.add_argument(
        "--threads", type=_positive, help="inference threads (default: all cores)"
    )
    evaluate.add_argument(
        "--repeats", type=_count, default=30, help="paired rounds of timing (default: 30; 0: none)"
    )
    evaluate.add_argument(
        "--memory", type=_count, default=3, metavar="N",
        help="processes whose peak memory is read, for each model (default: 3; 0: none)",
    )  # fmt: skip
    evaluate.add_argument("--plot", type=Path, metavar="FILE", help="also draw the result as a PNG")
    evaluate.add_argument("--json", action="store_true", help="one JSON object")

    quantize = command("quantize", _quantize, "make a model smaller: float16, int8 or int4")
    quantize.add_argument("model", metavar="MODEL", help="a name from `models list`, or ONNX file")
    quantize.add_argument(
        "--to", default="int8", metavar="SCHEME",
        help="fp16, int8, int8-minmax, int8-entropy, int8-percentile, int8-per-tensor, "
        "int8-dynamic or int4-weights (default: int8)",
    )  # fmt: skip
    quantize.add_argument(
        "--calibrate", type=Path, metavar="DIR",
        help="pictures like those that the model will see, none that it is scored on (default: for "
        "the models that ship, renders for this purpose)",
    )  # fmt: skip
    quantize.add_argument(
        "--images", type=_positive, default=256, metavar="N",
        help="pictures to calibrate with, at most (default: 256)",
    )  # fmt: skip
    quantize.add_argument(
        "--labels", type=Path, metavar="FILE",
        help="ImageNet's list of classes, for a model that does not carry its labels",
    )  # fmt: skip
    quantize.add_argument(
        "--keep-float", action="append", default=[], metavar="LAYER",
        help="a layer that stays in float32; may be given several times (--layers lists them)",
    )  # fmt: skip
    quantize.add_argument(
        "--output", type=Path, metavar="FILE", help="(default: MODEL-SCHEME.onnx, here)"
    )
    quantize.add_argument(
        "--layers", action="store_true", help="also say what each layer lost, on 8 of the pictures"
    )
    quantize.add_argument("--json", action="store_true", help="one JSON object")

    guest = commands.add_parser("guest", help="the Rust guests").add_subparsers(
        required=True, metavar="COMMAND"
    )
    build = guest.add_parser("build", help="build the guests that are not up to date")
    build.set_defaults(command=_guest_build)
    build.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="classify, classify_nn, cli [these three]; classify_tract, component",
    )

    models = commands.add_parser("models", help="known models").add_subparsers(
        required=True, metavar="COMMAND"
    )
    models.add_parser("list", help="list the models").set_defaults(command=_models_list)
    for name, action, text in (
        ("fetch", _models_fetch, "download a model, checked against its pin"),
        ("info", _models_info, "show what a model is and how it wants to be fed"),
    ):
        sub = models.add_parser(name, help=text)
        sub.set_defaults(command=action)
        sub.add_argument("name", help="a name from `models list`, or a file")

    serve = command("serve", _serve, "serve models: the Open Inference Protocol, HTTP and gRPC")
    serve.add_argument(
        "models", nargs="*", metavar="MODEL", default=["signs"],
        help="names from `models list`, or NAME=FILE (default: signs)",
    )  # fmt: skip
    serve.add_argument("--host", default="127.0.0.1", help="address (default: this machine only)")
    serve.add_argument("--http-port", type=_count, default=8080, metavar="N", help="0: any free")
    serve.add_argument("--grpc-port", type=_count, default=8081, metavar="N", help="0: any free")
    serve.add_argument("--no-grpc", action="store_true", help="HTTP only")
    serve.add_argument("--workers", type=_positive, metavar="N", help="guests (default: cores)")
    serve.add_argument(
        "--queue", type=_count, metavar="N", help="requests that may wait (default: as workers)"
    )
    serve.add_argument(
        "--max-bytes", type=_positive, default=16 << 20, metavar="N", help="largest request"
    )
    serve.add_argument(
        "--max-seconds", type=float, default=10.0, metavar="S", help="longest request (default: 10)"
    )
    serve.add_argument(
        "--memory", type=_positive, default=512 << 20, metavar="BYTES",
        help="of model files loaded at a time; the least recently used goes (default: 512 MiB)",
    )  # fmt: skip
    serve.add_argument("--certificate", type=Path, metavar="PEM", help="for TLS, with --key")
    serve.add_argument("--key", type=Path, metavar="PEM")

    load = command("load", _load, "send requests on a schedule, and say how long answers take")
    load.add_argument(
        "url", nargs="?", metavar="URL",
        help="where to POST, e.g. http://127.0.0.1:8080/v2/models/signs/infer",
    )  # fmt: skip
    load.add_argument("--rate", type=float, metavar="N", help="requests a second (default: 10)")
    load.add_argument("--seconds", type=float, metavar="S", help="how long (default: 10)")
    load.add_argument(
        "--connections", type=_positive, default=64, metavar="N", help="at most (default: 64)"
    )
    load.add_argument("--image", type=Path, help="picture to send (default: the shipped sign)")
    load.add_argument(
        "--tensor", action="store_true",
        help="send the model's own input instead, in the binary form: random numbers",
    )  # fmt: skip
    load.add_argument("--any-host", action="store_true", help="not only this machine's servers")
    load.add_argument(
        "--compare", action="store_true",
        help="start and measure our server, plain kserve and bare loops, side by side",
    )  # fmt: skip
    load.add_argument("--model", default="signs", help="for --compare (default: signs)")
    load.add_argument(
        "--rounds", type=_positive, default=6, help="for --compare, --seconds (2) each (default: 6)"
    )
    load.add_argument("--json", action="store_true", help="one JSON object")

    waterfall = command(
        "waterfall", _waterfall, "time the article's naive service, and each improvement in turn"
    )
    _model_options(waterfall)
    waterfall.add_argument("--image", type=Path, help="picture to use (default: the shipped sign)")
    waterfall.add_argument(
        "--int8", metavar="MODEL", help="the same model in int8 (default: it is quantized now)"
    )
    waterfall.add_argument(
        "--calibrate", type=Path, metavar="DIR", help="pictures to quantize with, see `quantize`"
    )
    waterfall.add_argument(
        "--labels", type=Path, metavar="FILE",
        help="ImageNet's list of classes, for models that do not carry their labels",
    )  # fmt: skip
    waterfall.add_argument(
        "--repeats", type=_positive, default=30, help="paired rounds (default: 30)"
    )
    waterfall.add_argument("--plot", type=Path, metavar="FILE", help="also draw it as a PNG")
    waterfall.add_argument("--json", action="store_true", help="one JSON object")

    rivals = command(
        "rivals", _rivals,
        "compare ways to run the same model: cold start, latency and size (claims C6, C7, C8)",
    )  # fmt: skip
    rivals.add_argument(
        "--model",
        default="signs",
        help="a name from `models list`, or an ONNX file (default: signs)",
    )
    rivals.add_argument(
        "--rows",
        metavar="NAME,...",
        help="what to compare with `bare` (default: all); `help` lists",
    )
    rivals.add_argument(
        "--rounds", type=_positive, default=10, metavar="N", help="paired rounds (default: 10)"
    )
    rivals.add_argument(
        "--repeats", type=_positive, default=20, metavar="N",
        help="runs of the model that count, in each process (default: 20)",
    )  # fmt: skip
    rivals.add_argument("--json", action="store_true", help="one JSON object")

    deploy = command(
        "deploy",
        _deploy,
        "write manifests for Kubernetes and KServe, check some, or weigh the parts",
    )
    deploy.add_argument(
        "model", nargs="?", default="signs", metavar="MODEL",
        help="a name from `models list`, or NAME=FILE (default: signs)",
    )  # fmt: skip
    deploy.add_argument(
        "--image",
        metavar="REF",
        help="what Containerfile makes (default: localhost/edgelab:VERSION)",
    )
    deploy.add_argument(
        "--model-image", metavar="REF", help="an image with /NAME.onnx in it, by its digest"
    )
    deploy.add_argument(
        "--wasm-image", metavar="REF", help="also run the guest cli without a container: its image"
    )
    deploy.add_argument("--replicas", type=_positive, default=3, metavar="N", help="(default: 3)")
    deploy.add_argument(
        "--workers", type=_positive, default=1, metavar="N", help="cores for each (default: 1)"
    )
    deploy.add_argument(
        "--output", type=Path, default=Path("deploy"), metavar="DIR", help="(default: deploy)"
    )
    deploy.add_argument(
        "--kubernetes", metavar="VERSION", help="whose schemas to check with, e.g. 1.34"
    )
    deploy.add_argument(
        "--check", type=Path, nargs="+", metavar="FILE", help="only check these files of manifests"
    )
    deploy.add_argument(
        "--sizes", action="store_true", help="only say what each part of a deployment weighs"
    )
    deploy.add_argument("--json", action="store_true", help="with --check or --sizes: JSON")

    bench = command("bench", _bench, "time in turns, on this machine; compare with earlier times")
    _model_options(bench)
    bench.add_argument("--image", type=Path, help="picture to use (default: the shipped sign)")
    bench.add_argument(
        "--repeats", type=_positive, default=200, help="paired rounds (default: 200)"
    )
    bench.add_argument(
        "--processes", type=_positive, default=8, metavar="N",
        help="share the rounds among N fresh processes; 1 prints more detail (default: 8)",
    )  # fmt: skip
    bench.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)  # shared by processes
    bench.add_argument("--seed", type=_count, default=0, help="of the rounds' order (default: 0)")
    bench.add_argument("--sections", metavar="NAME,...", help="what to time; `help` lists them")
    bench.add_argument(
        "--host", type=Path, metavar="FILE",
        help="time the WASI-NN host alone, on any ONNX file with one float32 input and output",
    )  # fmt: skip
    bench.add_argument(
        "--json", type=Path, metavar="FILE", help="write the numbers to FILE (docs/benchmarks.md)"
    )
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios as a PNG")
    bench.add_argument("--pyperf", type=Path, metavar="FILE", help="write the samples for pyperf")
    earlier = bench.add_mutually_exclusive_group()
    earlier.add_argument("--against", type=Path, metavar="OLD", help="compare with an earlier file")
    earlier.add_argument(
        "--keep", action="store_true",
        help="keep what --json FILE held as FILE's .previous.json, and compare with it",
    )  # fmt: skip
    earlier.add_argument(
        "--compare", type=Path, nargs=2, metavar=("OLD", "NEW"),
        help="time nothing; compare two files",
    )  # fmt: skip
    bench.add_argument(
        "--fail-above", type=float, metavar="FACTOR",
        help="exit with 1 if a row became slower by more than this, beyond its interval, e.g. 1.10",
    )  # fmt: skip
    bench.add_argument(
        "--any-machine", action="store_true", help="let --fail-above judge across machines too"
    )
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="signs",
        help="a name from `models list`, or an ONNX file (default: signs)",
    )
    parser.add_argument("--threads", type=_positive, help="inference threads (default: all cores)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _run(options: argparse.Namespace) -> int:
    from edgelab.build import build
    from edgelab.models import example_image
    from edgelab.paths import source_root
    from edgelab.pipeline import Pipeline

    _say("1. The Rust guests")
    if source_root() is not None:
        for guest in build().values():
            made = guest.provenance
            print(
                f"   {guest.name}.wasm  {guest.size_bytes:,} bytes  {made.toolchain}: {made.rustc}"
            )
    _say("2. Compile ahead of time, load the model through WASI-NN")
    pipeline = Pipeline(options.model, threads=options.threads)
    code = pipeline.guest.compiled
    print(f"   machine code: {code.artifact_bytes:,} bytes, {code.origin}, {code.load_ms:.1f} ms")
    print(f"   {pipeline.model!r}")
    image = options.image or example_image()
    _say(f"3. Classify {os.path.relpath(image)}")
    seen = pipeline.classify(image)
    for prediction in seen.top:
        print(f"   {prediction.probability:7.2%}  {prediction.label}")
    _say(f"4. Each stage, {options.repeats} rounds in turns with bare Python + ONNX Runtime")
    table = _stage_table(options, pipeline, image)
    if options.plot:
        from edgelab import plots
        from edgelab.images import decode
        from edgelab.paths import write_atomic

        picture = plots.stacked(plots.prediction(decode(image), seen), plots.stages(table))
        write_atomic(options.plot, picture.png)
        print(f"   drawn in {options.plot}")
    print(
        "\nNext: make lab (the lessons), or python -m edgelab classify YOUR.jpg "
        "--model mobilenetv2-12"
    )
    return 0


def _classify(options: argparse.Namespace) -> int:
    from edgelab.pipeline import Pipeline

    pipeline = Pipeline(options.model, kernel=options.kernel, threads=options.threads)
    failed = 0
    for name in options.images:
        try:
            seen = pipeline.classify(name, options.top)
        except EdgelabError as error:  # one bad picture must not lose the others
            failed += 1
            if options.json:
                print(json.dumps({"image": name, "error": str(error)}))
            print(f"edgelab: error: {error}", file=sys.stderr)
            continue
        if options.json:
            print(json.dumps({"image": name, **seen.to_dict()}, ensure_ascii=False))
        else:
            print(f"{name}  ({seen.total_ms:.1f} ms)")
            for prediction in seen.top:
                print(f"  {prediction.probability:7.2%}  {prediction.label}")
    return 1 if failed else 0


def _doctor(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from edgelab import doctor

    if options.table:
        print(doctor.table(), end="")
        return 0
    if options.files:
        return _diagnose(options)
    checks = doctor.examine()
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            print(f"{check.state:<8} {check.topic:<9} {check.detail}")
    return 1 if any(check.state == "failure" for check in checks) else 0


def _diagnose(options: argparse.Namespace) -> int:
    from edgelab.doctor import MAX_BYTES, diagnose

    failed = 0
    for name in options.files:
        try:
            found = diagnose(sys.stdin.buffer.read(MAX_BYTES) if name == "-" else name)
        except EdgelabError as error:  # one bad file must not lose the others
            failed += 1
            if options.json:
                print(json.dumps({"file": name, "error": str(error)}))
            print(f"edgelab: error: {error}", file=sys.stderr)
            continue
        failed += bool(found)
        if options.json:
            print(json.dumps({"file": name, "findings": found.to_dict()}))
        else:
            print(f"{name}\n{textwrap.indent(str(found), '  ')}\n")
    return 1 if failed else 0


def _inspect(options: argparse.Namespace) -> int:
    from edgelab.inspection import inspect

    failed = 0
    for name in options.files:
        try:
            found = inspect(name)
        except EdgelabError as error:  # one bad file must not lose the others
            failed += 1
            if options.json:
                print(json.dumps({"file": name, "error": str(error)}))
            print(f"edgelab: error: {name}: {error}", file=sys.stderr)
            continue
        if options.json:
            print(json.dumps({"file": name, **found.to_dict(functions=options.functions)}))
        else:
            print(f"{name}\n{found.describe(functions=options.functions)}\n")
        if not found.runs_here:
            failed += 1
            reasons = "; ".join(f"{p.id}: {p.what}" for p in found.problems if p.fatal)
            print(f"edgelab: error: {name} cannot run here. {reasons}.", file=sys.stderr)
    return 1 if failed else 0


def _batch(options: argparse.Namespace) -> int:
    from edgelab.batch import classify_folder

    done = classify_folder(
        options.folder,
        options.output,
        _labelled(options.model, options.labels),
        truth=options.truth,
        synsets=options.labels,
        workers=options.workers,
        ray=options.ray,
        chunk=options.chunk,
        progress=sys.stderr.isatty(),
    )
    print(json.dumps(done.to_dict(), indent=2) if options.json else done)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from edgelab.evaluate import evaluate

    seen, skipped = evaluate(
        options.models,
        baseline=options.baseline,
        images=options.images,
        imagenette=options.imagenette,
        labels=options.labels,
        count=options.count,
        schemes=options.to,
        folds=options.folds,
        calibrate=options.calibrate,
        backends=options.backend or ["onnxruntime"],
        threads=options.threads,
        repeats=options.repeats,
        memory_repeats=options.memory,
        progress=sys.stderr.isatty(),
    )
    for reason, number in skipped.items():
        print(f"edgelab: warning: skipped {number:,} files: {reason}", file=sys.stderr)
    if options.plot:
        from edgelab import plots
        from edgelab.paths import write_atomic

        write_atomic(options.plot, plots.pareto(seen).png)
    print(json.dumps(seen.to_dict(), indent=2, ensure_ascii=False) if options.json else seen)
    return 0


def _quantize(options: argparse.Namespace) -> int:
    from edgelab.datasets import tensors
    from edgelab.quantize import (
        CALIBRATED,
        calibration_pictures,
        load_source,
        quantize,
        sensitivity,
    )

    source = load_source(options.model, options.labels)
    output = options.output or Path(f"{Path(options.model).stem}-{options.to}.onnx")
    inputs, seen = None, None
    if options.to in CALIBRATED or options.layers:
        pictures, spec = calibration_pictures(source, options.calibrate, options.images)
        inputs = (tensors([picture], spec) for picture in pictures)
    made = quantize(source, output, options.to, calibration=inputs, keep_float=options.keep_float)
    if options.layers:
        some = [pictures[k] for k in range(min(8, len(pictures)))]
        seen = sensitivity(source, output, tensors(some, spec))
    if options.json:
        layers = {} if seen is None else {"sensitivity": seen.to_dict()}
        print(json.dumps({**made.to_dict(), **layers}, indent=2, ensure_ascii=False))
        return 0
    print(made)
    if seen is not None:
        print(f"\n{seen}")
    known = [options.model, str(output)]
    if options.labels:
        known += ["--labels", str(options.labels)]
    if options.calibrate:
        known += ["--images", "OTHER_DIR"]
    print(f"\nwritten to {output}\nNext: python -m edgelab evaluate {shlex.join(known)}")
    return 0


def _guest_build(options: argparse.Namespace) -> int:
    from edgelab.build import GUESTS, build

    for guest in build(options.names or GUESTS).values():
        made = guest.provenance
        print(f"{guest.path}  {guest.size_bytes:,} bytes  {made.toolchain}  {made.rustc}")
    return 0


def _models_list(_: argparse.Namespace) -> int:
    from edgelab import models

    for name in models.names():
        entry = models.registry()[name]
        where = "ships" if "path" in entry else "download"
        print(f"{name:<20} {entry['size_bytes']:>12,} bytes  {where:<9} {entry['title']}")
    return 0


def _models_fetch(options: argparse.Namespace) -> int:
    from edgelab import models

    print(models.load(options.name).path)
    return 0


def _models_info(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from edgelab import models

    model = models.load(options.name)
    facts = {
        "path": str(model.path),
        "size_bytes": model.size_bytes,
        "sha256": model.sha256,
        **asdict(model.spec),
    }
    print(json.dumps(facts, indent=2, ensure_ascii=False))
    return 0


def _serve(options: argparse.Namespace) -> int:
    try:
        from edgelab.serve import Server, Settings, run
    except ModuleNotFoundError as error:
        raise EdgelabError(f"serving needs {error.name}: pip install 'edgelab[serve]'") from None
    from edgelab.repository import Repository

    sources = {}
    for each in options.models:
        name, given, file = each.partition("=")
        sources[name] = Path(file) if given else name
    settings = Settings(
        host=options.host,
        http_port=options.http_port,
        grpc_port=None if options.no_grpc else options.grpc_port,
        workers=options.workers,
        queue=options.queue,
        body_bytes=options.max_bytes,
        request_seconds=options.max_seconds,
        token=os.environ.get("EDGELAB_TOKEN") or None,
        certificate=options.certificate,
        key=options.key,
    )
    repository = Repository(sources, max_bytes=options.memory, threads=1)
    for name in repository:
        repository[name]  # a model that does not load is found now, not on its first request
    run(Server(repository, settings).serve(_tell_where))
    return 0


def _load(options: argparse.Namespace) -> int:
    try:
        if options.compare:
            from edgelab.servers import side_by_side

            seen: Any = side_by_side(
                options.model, image=options.image, seconds=options.seconds or 2.0,
                rounds=options.rounds,
            )  # fmt: skip
        else:
            seen = _load_one(options)
    except ValueError as error:
        raise EdgelabError(str(error)) from None
    except ModuleNotFoundError as error:
        raise EdgelabError(f"this needs {error.name}: pip install 'edgelab[serve]'") from None
    print(json.dumps(seen.to_dict(), indent=2) if options.json else seen)
    return 0


def _load_one(options: argparse.Namespace) -> Any:
    from edgelab.load import load, tensor_request
    from edgelab.models import example_image

    if options.url is None:
        raise EdgelabError("say where to: URL, or --compare. Start one: python -m edgelab serve")
    token = os.environ.get("EDGELAB_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if options.tensor:
        body, more = tensor_request(options.url, headers, any_host=options.any_host)
    else:
        body, more = (options.image or example_image()).read_bytes(), {"Content-Type": "image/jpeg"}
    return load(
        options.url, body, {**headers, **more}, rate=options.rate or 10.0,
        seconds=options.seconds or 10.0, connections=options.connections,
        any_host=options.any_host,
    )  # fmt: skip


def _tell_where(server: Any) -> None:
    scheme = "http" if server.settings.certificate is None else "https"
    print(f"HTTP: {scheme}://{server.settings.host}:{server.http_port}/v2", flush=True)
    if server.grpc_port is not None:
        print(f"gRPC: {server.settings.host}:{server.grpc_port}", flush=True)
    if server.settings.token is None and server.settings.host != "127.0.0.1":
        print("edgelab: warning: anybody who reaches this address can use it; set EDGELAB_TOKEN",
              file=sys.stderr)  # fmt: skip


def _waterfall(options: argparse.Namespace) -> int:
    from edgelab.pipeline import Pipeline
    from edgelab.waterfall import in_int8, overhead, walk

    picture = None if options.image is None else _read(options.image)
    model = _labelled(options.model, options.labels)
    small = None
    if options.int8:
        small = _labelled(options.int8, options.labels)
    else:
        try:
            small = in_int8(model, options.calibrate)
        except EdgelabError as error:
            if options.calibrate:
                raise
            print(f"edgelab: warning: no step in int8: {error}", file=sys.stderr)
    rounds, threads = options.repeats, options.threads
    seen = walk(model, small, image=picture, repeats=rounds, threads=threads)
    whole = overhead(Pipeline(small or model, threads=threads), picture, repeats=4 * rounds)
    if options.plot:
        from edgelab import plots
        from edgelab.paths import write_atomic

        write_atomic(options.plot, plots.waterfall(seen).png)
    if options.json:
        print(json.dumps({**seen.to_dict(), "overhead": whole.to_dict()}, ensure_ascii=False))
    else:
        print(f"{seen}\n\n{whole}")
    return 0


def _labelled(name: str, labels: Path | None) -> Any:
    from edgelab import models

    spec = None if labels is None else models.imagenet_spec(Path(name).stem, labels)
    return models.load(name, spec=spec)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EdgelabError(f"cannot read {path}: {error}") from None


def _rivals(options: argparse.Namespace) -> int:
    from edgelab import rivals

    if options.rows == "help":
        for name, rival in rivals.RIVALS.items():
            print(f"{name:<13} {rival.title}; {rival.engine}")
        return 0
    table = rivals.measure_rivals(
        options.model, rows=options.rows.split(",") if options.rows else None,
        rounds=options.rounds, repeats=options.repeats,
        progress=lambda text: print(f"edgelab: {text}", file=sys.stderr, flush=True),
    )  # fmt: skip
    print(json.dumps(table.to_dict(), indent=2) if options.json else table)
    return 1 if table.wrong else 0


def _deploy(options: argparse.Namespace) -> int:
    if options.sizes:
        from edgelab.sizes import sizes

        weighed = sizes()
        print(json.dumps(weighed.to_dict(), indent=2) if options.json else weighed)
        return 0
    from edgelab import manifests

    version = options.kubernetes or manifests.KUBERNETES
    if options.check:
        read = [each for path in options.check for each in manifests.read(path)]
        found = manifests.check(read, version=version)
        print(json.dumps(found.to_dict(), indent=2) if options.json else found)
        return 1 if found else 0
    from dataclasses import replace

    from edgelab import deploy

    given = {"image": options.image, "model_image": options.model_image}
    chosen = {name: value for name, value in given.items() if value is not None}
    # Names and references are checked before anything is measured.
    nothing = deploy.Footprint(options.model, options.workers, 0, 0, 0, 0, 0)
    plan = deploy.Plan(options.model, nothing, replicas=options.replicas, **chosen)
    if options.wasm_image is not None:
        deploy.check_image(options.wasm_image)
    footprint = deploy.measure_footprint(options.model, workers=options.workers)
    print(footprint)
    plan = replace(plan, footprint=footprint)
    for path in deploy.write(plan, options.output, wasm_image=options.wasm_image):
        found = manifests.check(manifests.read(path), version=version, footprint=footprint)
        print(f"{path}: {found}")
        if found:
            return 1
    print(f"Next: kubectl apply -f {options.output}/kubernetes.yaml")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from edgelab import bench, results
    from edgelab.measure import fingerprint

    if options.compare:
        return _judge(options, *(results.read(path) for path in options.compare))
    if options.sections == "help":
        print("\n".join(f"{name:<10} {what}" for name, what in bench.SECTIONS.items()))
        return 0
    old = results.read(options.against) if options.against else _kept(options)
    environment = fingerprint(threads=options.threads)
    print(f"{environment}\n", flush=True)
    if options.processes > 1:
        merged = bench.in_processes(
            options.processes, _for_each(options), progress=sys.stderr.isatty()
        )
        new = results.Results(environment, merged.sections)
        for section in new.sections.values():
            print(textwrap.indent(str(section), "   "), end="\n\n")
    else:
        sections = {}
        for table, section in _tables(options):
            sections[section.name] = section
            print(textwrap.indent(str(table), "   "), end="\n\n", flush=True)
        new = results.Results(environment, sections)
    if options.keep and options.json.exists():
        os.replace(options.json, results.previous(options.json))
    if options.json:
        new.write(options.json)
    if options.pyperf:
        results.write_pyperf(new, options.pyperf)
    if options.plot:
        from edgelab import plots
        from edgelab.paths import write_atomic

        write_atomic(options.plot, plots.ratios(new).png)
    written = [path for path in (options.json, options.plot, options.pyperf) if path]
    if written:
        print(f"written to {', '.join(map(str, written))}")
    return _judge(options, old, new) if old else 0


def _for_each(options: argparse.Namespace) -> list[str]:
    """The arguments for one of several processes, with its share of the rounds."""
    given = {
        "--model": options.model,
        "--threads": options.threads,
        "--image": options.image,
        "--sections": options.sections,
        "--host": options.host,
        "--repeats": -(-options.repeats // options.processes),
    }
    return [f"{name}={value}" for name, value in given.items() if value is not None]


def _tables(options: argparse.Namespace) -> Iterator[tuple[object, Section]]:
    from edgelab import bench

    if options.host:
        table = bench.host_table(
            _read(options.host), name=options.host.stem, repeats=options.repeats,
            threads=options.threads, seed=options.seed,
        )  # fmt: skip
        yield table, table.section
    else:
        sections = options.sections.split(",") if options.sections else bench.DEFAULT_SECTIONS
        yield from bench.run(
            sections, model=options.model, image=options.image, repeats=options.repeats,
            threads=options.threads, seed=options.seed, scratch=options.scratch,
        )  # fmt: skip


def _kept(options: argparse.Namespace) -> Results | None:
    """The results that are about to become the previous ones; None if there are none."""
    from edgelab import results

    if not options.keep:
        return None
    if not options.json:
        raise EdgelabError("--keep is about the file that --json FILE names; give both")
    if not options.json.exists():
        return None
    try:
        return results.read(options.json)
    except EdgelabError as error:  # this must not keep anyone from measuring anew
        warnings.warn(str(error), stacklevel=2)
        return None


def _judge(options: argparse.Namespace, old: Results, new: Results) -> int:
    """Print what changed; the exit code says whether that is too much."""
    from edgelab import results

    found = results.changes(old, new)
    print(f"\nold: {old.environment.taken}  new: {new.environment.taken}\n{found}")
    limit = options.fail_above
    if limit is None:
        return 0
    if not found.rows:
        raise EdgelabError("--fail-above has nothing to judge: the two runs share no row")
    if found.machine and not options.any_machine:
        raise EdgelabError(
            f"--fail-above can't judge runs of two machines ({'; '.join(found.machine)}): ratios "
            "differ between CPUs. Measure both on one, or add --any-machine."
        )
    worse = found.worse_than(limit)
    for row in worse:
        print(
            f"edgelab: {row.section}: {row.row} is slower by {row.factor}, more than {limit:g}",
            file=sys.stderr,
        )
    return 1 if worse else 0


def _stage_table(options: argparse.Namespace, pipeline: Any, image: Path) -> Any:
    from edgelab.bench import stage_table

    table = stage_table(pipeline, image, repeats=options.repeats, threads=options.threads)
    here = table.environment
    print(f"   {here.cpu}, {here.cores} core(s), wasmtime {here.versions['wasmtime']}, "
          f"onnxruntime {here.versions['onnxruntime']}\n")  # fmt: skip
    print("\n".join(f"   {line}" for line in str(table).splitlines()))
    if not table.same_label:
        raise EdgelabError("the guest and bare Python see different labels; please report this")
    return table


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"edgelab: warning: {message}", file=sys.stderr)
