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
  python -m edgelab doctor                       what is wrong here, and the cure
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

    doctor = command("doctor", _doctor, "check this machine and say how to mend what is wrong")
    doctor.add_argument("--json", action="store_true", help="a JSON list of findings")

    inspect = command(
        "inspect", _inspect, "say what a .wasm file is, what it wants, and whether it runs here"
    )
    inspect.add_argument("files", nargs="+", metavar="FILE", help="a module or a component")
    inspect.add_argument("--json", action="store_true", help="one JSON object a file and line")
    inspect.add_argument("--functions", action="store_true", help="with a line for each function")

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

    from edgelab.doctor import examine

    findings = examine()
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.state:<8} {finding.topic:<9} {finding.detail}")
    return 1 if any(finding.state == "failure" for finding in findings) else 0


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
    import asyncio

    try:
        from edgelab.serve import Server, Settings
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
    asyncio.run(Server(repository, settings).serve(_tell_where))
    return 0


def _tell_where(server: Any) -> None:
    scheme = "http" if server.settings.certificate is None else "https"
    print(f"HTTP: {scheme}://{server.settings.host}:{server.http_port}/v2", flush=True)
    if server.grpc_port is not None:
        print(f"gRPC: {server.settings.host}:{server.grpc_port}", flush=True)
    if server.settings.token is None and server.settings.host != "127.0.0.1":
        print("edgelab: warning: anybody who reaches this address can use it; set EDGELAB_TOKEN",
              file=sys.stderr)  # fmt: skip


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
        try:
            data = options.host.read_bytes()
        except OSError as error:
            raise EdgelabError(f"cannot read {options.host}: {error}") from None
        table = bench.host_table(
            data, name=options.host.stem, repeats=options.repeats, threads=options.threads,
            seed=options.seed,
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
