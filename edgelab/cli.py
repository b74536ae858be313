"""The command line. Each command is a thin line over the package."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from edgelab import __version__
from edgelab.errors import EdgelabError

_EPILOG = """\
examples:
  python -m edgelab run                          the article's path, end to end
  python -m edgelab classify photo.jpg --top 5   what is in a picture
  python -m edgelab classify *.jpg --json        the same for programs, one line a picture
  python -m edgelab classify dog.jpg --model mobilenetv2-12
  python -m edgelab doctor                       what is wrong here, and the cure
  python -m edgelab inspect guest.wasm           what a module is, and whether it runs here

environment:
  EDGELAB_CACHE       folder for machine code and downloads (default: the user's cache folder)
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

    bench = command("bench", _bench, "time both paths in turns, on this machine")
    _model_options(bench)
    bench.add_argument("--image", type=Path, help="picture to use (default: the shipped sign)")
    bench.add_argument(
        "--repeats", type=_positive, default=200, help="paired rounds (default: 200)"
    )
    bench.add_argument(
        "--host", type=Path, metavar="FILE",
        help="time the WASI-NN host alone, on any ONNX file with one float32 input and output",
    )  # fmt: skip
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
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


def _run(options: argparse.Namespace) -> int:
    from edgelab.bench import example_image
    from edgelab.build import build
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


def _bench(options: argparse.Namespace) -> int:
    from edgelab.bench import example_image, host_table
    from edgelab.paths import write_atomic
    from edgelab.pipeline import Pipeline

    tables = {}
    if options.host:
        try:
            model, name = options.host.read_bytes(), options.host.stem
        except OSError as error:
            raise EdgelabError(f"cannot read {options.host}: {error}") from None
    else:
        pipeline = Pipeline(options.model, threads=options.threads)
        model, name = pipeline.model.data, pipeline.model.spec.name
        tables["stages"] = _stage_table(options, pipeline, options.image or example_image())
    host = host_table(model, name=name, repeats=options.repeats, threads=options.threads)
    tables["wasi_nn"] = host
    print(f"\n   {name}, {options.threads or host.environment.cores} thread(s)\n")
    print("\n".join(f"   {line}" for line in str(host).splitlines()))
    if options.json:
        plain = {kind: table.to_dict() for kind, table in tables.items()}
        write_atomic(options.json, (json.dumps(plain, indent=2) + "\n").encode())
        print(f"written to {options.json}")
    return 0


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
