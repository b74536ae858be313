"""Figures that lessons show. Each is a picture, its description, and its numbers as a table.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart, and no figure relies
on colour alone: hatches and labels say the same. The background is white, so that a figure is
readable on a dark page too.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgelab.bench import StageTable
    from edgelab.evaluate import Evaluation, Score
    from edgelab.kernels import KernelRow, KernelTable
    from edgelab.load import Load
    from edgelab.pipeline import Classification
    from edgelab.quantize import Sensitivity
    from edgelab.results import Results
    from edgelab.waterfall import Step, Walk

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"
RED = "#D55E00"
_WIDTH = 8.0  # inches, of every figure
_HATCHES = {BLUE: "", ORANGE: "///", GREEN: "...", GREY: "xx", RED: "\\\\\\"}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings.

    Attributes
    ----------
    caption : str
    columns : tuple of str
    rows : tuple of tuple
        As many cells in each as there are columns.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]

    def __repr__(self) -> str:
        lines = [self.columns, *([str(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        return "\n".join([self.caption, *text])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        caption = escape(self.caption)
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{body}</table>"


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure that can also be read without seeing it.

    Attributes
    ----------
    alt : str
        What the figure shows, for screen readers.
    table : Table
        What it is drawn from.
    png : bytes
    """

    alt: str
    table: Table
    png: bytes = field(repr=False)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        # Notebooks have no place for the alternative text of an image/png, so HTML carries it.
        # GitHub shows the image/png.
        png = base64.b64encode(self.png).decode()
        page = (
            f'<img alt="{escape(self.alt)}" src="data:image/png;base64,{png}" '
            'style="max-width: 100%; width: 800px">'
            f"<details><summary>As a table</summary>{self.table._repr_html_()}</details>"
        )
        return {"text/plain": f"{self.alt}\n{self.table}", "text/html": page, "image/png": png}


def _plot(figure: Figure, alt: str, table: Table) -> Plot:
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=110, facecolor="white")
    # Notebooks keep some figures: a palette makes a photograph's PNG a third as large.
    Image.open(full).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return Plot(alt, table, small.getvalue())


def _blank(figure: Figure, width: float, height: float) -> Axes:
    """Axes without axes: a sheet to draw boxes on."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def _box(axes: Axes, x: float, y: float, w: float, h: float, colour: str, text: str) -> None:
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor="white", edgecolor=colour, lw=2)
    )
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=10)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 1.4, "color": "black"})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(
        x, y, text, ha="center", va="center", fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def data_flow() -> Plot:
    """The four stages of a classification, and who runs each."""
    figure = Figure((_WIDTH, 3.7))
    axes = _blank(figure, 16, 7.4)
    lanes = (
        (5.1, BLUE, "host", "Python"),
        (2.7, ORANGE, "guest", "Wasm sandbox"),
        (0.3, GREEN, "backend", "ONNX Runtime"),
    )
    for y, colour, name, what in lanes:
        axes.add_patch(Rectangle((0.2, y), 15.6, 2.0, facecolor=colour, alpha=0.13, lw=0))
        axes.add_patch(
            Rectangle((0.2, y), 0.3, 2.0, facecolor=colour, hatch=_HATCHES[colour], alpha=0.6)
        )
        axes.text(0.75, y + 1.25, name, fontsize=10, va="center", weight="bold")
        axes.text(0.75, y + 0.75, what, fontsize=9, va="center")
    _box(axes, 3.2, 5.6, 2.2, 1.0, BLUE, "decode")
    _box(axes, 5.8, 3.2, 2.4, 1.0, ORANGE, "preprocess")
    _box(axes, 8.6, 0.8, 2.0, 1.0, GREEN, "infer")
    _box(axes, 11.0, 3.2, 2.4, 1.0, ORANGE, "postprocess")
    _box(axes, 13.6, 5.6, 1.9, 1.0, BLUE, "label")
    _arrow(axes, (4.6, 5.6), (6.5, 4.2), "pixels, u8\nheight × width × 3")
    _arrow(axes, (7.4, 3.2), (9.1, 1.8), "tensor, f32\n1 × 3 × 224 × 224")
    _arrow(axes, (10.1, 1.8), (11.8, 3.2), "logits, f32\n1 × classes")
    _arrow(axes, (12.7, 4.2), (14.3, 5.6), "indices,\nprobabilities")
    axes.text(15.7, 2.5, "WASI-NN", ha="right", va="center", fontsize=9, style="italic")
    rows = (
        ("decode", "a file: JPEG, PNG, …", "pixels, u8, height × width × 3", "host (Python)"),
        ("preprocess", "pixels", "tensor, f32, 1 × 3 × 224 × 224", "guest (Wasm)"),
        ("infer", "tensor", "logits, f32, 1 × classes", "backend, called through WASI-NN"),
        ("postprocess", "logits", "class indices and probabilities", "guest (Wasm)"),
    )
    return _plot(
        figure,
        "Data flow in three lanes. The host decodes; the guest preprocesses and postprocesses; "
        "between the two, WASI-NN takes the tensor to the backend, which infers.",
        Table("The four stages", ("stage", "takes", "gives", "runs in"), rows),
    )


def pictures(images: Sequence[NDArray[Any]], captions: Sequence[str]) -> Plot:
    """Show pictures side by side.

    Parameters
    ----------
    images : sequence of numpy.ndarray
        ``uint8``, ``(height, width, 3)``.
    captions : sequence of str
        One for each.
    """
    columns = max(4, min(len(images), 6))  # at least four, or a single picture would be huge
    rows = -(-len(images) // columns)
    figure = Figure((_WIDTH, (_WIDTH / columns + 0.25) * rows), layout="constrained")
    for place, (image, caption) in enumerate(zip(images, captions, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(image)
        axes.set_title(caption, fontsize=9)
        axes.axis("off")
    cells = tuple((k, caption) for k, caption in enumerate(captions))
    return _plot(
        figure, f"Pictures: {'; '.join(captions)}.", Table("Pictures", ("place", "shows"), cells)
    )


def prediction(image: NDArray[Any], seen: Classification) -> Plot:
    """Show a picture beside what the model sees in it.

    Parameters
    ----------
    image : numpy.ndarray
        ``uint8``, ``(height, width, 3)``.
    seen : edgelab.pipeline.Classification
    """
    figure = Figure((_WIDTH, 2.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.4))
    left.imshow(image)
    left.axis("off")
    names, values = [p.label for p in seen.top], [p.probability for p in seen.top]
    _barh(right, names, values, [f"{value:.1%}" for value in values])
    right.set(xlim=(0, 1.18), xticks=(0, 0.5, 1), xlabel="probability")
    return _plot(
        figure,
        f"A picture, and the model's {len(names)} most probable labels for it. "
        f"The first is {names[0]}.",
        Table(
            "What the model sees",
            ("label", "probability"),
            tuple((p.label, f"{p.probability:.1%}") for p in seen.top),
        ),
    )


def _barh(axes: Axes, names: Sequence[str], values: Sequence[float], texts: Sequence[str]) -> None:
    """Horizontal bars, the first on top, each with its number."""
    bars = axes.barh(names, values, height=0.6, color=BLUE)
    axes.bar_label(bars, texts, padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def bars(
    values: Mapping[str, float], *, title: str, unit: str = "bytes", log: bool = False
) -> Plot:
    """Compare a few numbers.

    Parameters
    ----------
    values : mapping of str to float
    title : str
    unit : str
    log : bool
        Logarithmic axis, for numbers of very different size. Such bars compare factors, not sums.
    """
    figure = Figure((_WIDTH, 0.9 + 0.36 * len(values)), layout="constrained")
    axes = figure.subplots()
    names, numbers = list(values), list(values.values())
    texts = [f"{n:,.4g}" if isinstance(n, float) else f"{n:,}" for n in numbers]
    if log:  # points: a bar's length would depend on where the axis begins
        axes.plot(numbers, names, "o", color=BLUE)
        axes.set(xscale="log", xlabel=f"{unit}, logarithmic")
        axes.grid(axis="y", lw=0.5)
        for number, name, text in zip(numbers, names, texts, strict=True):
            axes.annotate(text, (number, name), (8, 0), textcoords="offset points", va="center")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    else:
        _barh(axes, names, numbers, texts)
        axes.set(xlabel=unit)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter("{x:,.10g}")  # no factor of ten in a corner
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.2)
    largest = max(values, key=lambda name: values[name])
    return _plot(
        figure,
        f"Bars: {title}. Largest is {largest}.",
        Table(title, ("", unit), tuple(zip(values, texts, strict=True))),
    )


def stages(table: StageTable) -> Plot:
    """Show how long each stage takes, in the guest's path and in bare Python's.

    Parameters
    ----------
    table : edgelab.bench.StageTable
    """
    names = [name for name in table.guest if name != "total"]
    figure = Figure((_WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    paths = (
        ("guest + WASI-NN", table.guest, ORANGE, -0.19),
        ("bare Python", table.bare, BLUE, 0.19),
    )
    for label, path, colour, offset in paths:
        medians = [path[name].median_ms for name in names]
        tails = [path[name].p95_ms - path[name].median_ms for name in names]
        axes.barh(
            [k + offset for k in range(len(names))], medians, height=0.36, label=label, xerr=(
                [0.0] * len(names), tails), color=colour, hatch=_HATCHES[colour], edgecolor="black",
            lw=0.5, error_kw={"lw": 1, "capsize": 3},
        )  # fmt: skip
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="ms: median, whisker to p95")
    axes.invert_yaxis()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    longest = max(names, key=lambda name: table.guest[name].median_ms)
    rows = tuple(
        (name, f"{a.median_ms:.2f}", f"{a.p95_ms:.2f}", f"{b.median_ms:.2f}", f"{b.p95_ms:.2f}")
        for name, a, b in ((name, table.guest[name], table.bare[name]) for name in table.guest)
    )
    columns = ("stage", "guest median", "guest p95", "bare median", "bare p95")
    return _plot(
        figure,
        f"Time of each stage. In the guest's path {longest} takes longest.",
        Table("Milliseconds", columns, rows),
    )


def memory_map(size_bytes: int, blocks: Mapping[str, tuple[int, int]]) -> Plot:
    """Show where blocks lie in a guest's linear memory.

    Parameters
    ----------
    size_bytes : int
        Size of the memory.
    blocks : mapping of str to (int, int)
        Name → address and length in bytes. A block too thin to see is drawn as a line.
    """
    figure = Figure((_WIDTH, 1.1 + 0.42 * len(blocks)), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(0, size_bytes, facecolor=GREY, alpha=0.15)
    colours = (BLUE, ORANGE, GREEN)
    for row, (pointer, length) in enumerate(blocks.values()):
        colour = colours[row % len(colours)]
        axes.barh(
            row, max(length, size_bytes / 250), left=pointer, height=0.6, color=colour,
            hatch=_HATCHES[colour], edgecolor="black", lw=0.5,
        )  # fmt: skip
        right = pointer + length < 0.7 * size_bytes
        axes.text(
            pointer + length + size_bytes * 0.01 if right else pointer - size_bytes * 0.01, row,
            f"{pointer:#x}, {length:,} bytes", va="center", ha="left" if right else "right",
            fontsize=9,
        )  # fmt: skip
    axes.set(yticks=range(len(blocks)), yticklabels=list(blocks), xlim=(0, size_bytes))
    ticks = [size_bytes * k // 4 for k in range(5)]
    axes.set_xticks(ticks, [f"{tick:#x}" for tick in ticks])
    axes.set(xlabel=f"address in the guest's linear memory (grey: all {size_bytes:,} bytes)")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    rows = tuple(
        (name, f"{pointer:#x}", f"{length:,}", f"{pointer + length:#x}")
        for name, (pointer, length) in blocks.items()
    )
    return _plot(
        figure,
        f"Map of {size_bytes:,} bytes of guest memory with {len(blocks)} blocks: "
        f"{', '.join(blocks)}.",
        Table("Blocks", ("block", "address", "bytes", "end"), rows),
    )


def one_call() -> Plot:
    """Who does what, and who owns which block, in one call through the article's JSON ABI."""
    steps = (
        ("alloc(n)", "host → guest", "the guest gives n bytes; now the host owns the request"),
        ("write", "host", "the host copies the JSON text into its block"),
        ("infer(p, n)", "host → guest", "the guest reads, works, and makes the answer's block"),
        ("pointer << 32 | length", "guest → host", "both in one i64; now the host owns the answer"),
        ("read", "host", "the host copies the answer out"),
        ("dealloc, twice", "host → guest", "request and answer go back, each with its length"),
    )
    figure = Figure((_WIDTH, 3.9))
    axes = _blank(figure, 16, 7.8)
    for x, colour, name in ((2.0, BLUE, "host"), (7.4, ORANGE, "guest")):
        axes.plot((x, x), (0.3, 6.9), color=colour, lw=3, solid_capstyle="butt")
        _box(axes, x - 1.0, 6.85, 2.0, 0.75, colour, name)
    for row, (what, direction, why) in enumerate(steps):
        y = 6.2 - row * 1.08
        ends = {"host → guest": (2.1, 7.3), "guest → host": (7.3, 2.1)}.get(direction)
        if ends:
            _arrow(axes, (ends[0], y), (ends[1], y), what)
        else:
            axes.plot(2.0, y, "o", color="black")
            axes.text(2.35, y, what, va="center", fontsize=8)
        axes.text(0.8, y, str(row + 1), va="center", ha="center", fontsize=10, weight="bold")
        axes.text(8.1, y, why, va="center", fontsize=8.5)
    rows = tuple((row + 1, *step) for row, step in enumerate(steps))
    return _plot(
        figure,
        "One call in six steps: alloc, write, infer, the packed answer, read, dealloc twice.",
        Table("One call", ("step", "what", "who", "why"), rows),
    )


def start_up() -> Plot:
    """What is done once and what at each start, for a module and for a model."""
    figure = Figure((_WIDTH, 2.9))
    axes = _blank(figure, 16, 5.8)
    axes.add_patch(Rectangle((0.2, 0.15), 6.9, 5.5, facecolor=GREY, alpha=0.15, lw=0))
    axes.text(3.65, 5.15, "once, ahead of time", ha="center", fontsize=10, weight="bold")
    axes.text(11.6, 5.15, "at each start", ha="center", fontsize=10, weight="bold")
    for y, colour, name in ((3.0, ORANGE, "the module"), (0.6, GREEN, "the model")):
        axes.text(0.7, y + 1.3, name, fontsize=10)
        axes.add_patch(
            Rectangle((0.2, y - 0.2), 0.2, 1.9, facecolor=colour, hatch=_HATCHES[colour], alpha=0.6)
        )
    _box(axes, 0.7, 3.0, 1.4, 1.0, ORANGE, ".wasm")
    _box(axes, 3.9, 3.0, 2.4, 1.0, ORANGE, "machine code")
    _box(axes, 8.9, 3.0, 1.6, 1.0, ORANGE, "module")
    _box(axes, 12.3, 3.0, 1.7, 1.0, ORANGE, "instance")
    _box(axes, 3.9, 0.6, 2.4, 1.0, GREEN, "model file")
    _box(axes, 12.3, 0.6, 1.7, 1.0, GREEN, "session")
    axes.text(15.1, 2.3, "answer", ha="center", va="center", fontsize=10, weight="bold")
    _arrow(axes, (2.1, 3.5), (3.9, 3.5), "compile")
    _arrow(axes, (6.3, 3.5), (8.9, 3.5), "load")
    _arrow(axes, (10.5, 3.5), (12.3, 3.5), "instantiate")
    _arrow(axes, (14.0, 3.5), (15.1, 2.6), "call")
    _arrow(axes, (6.3, 1.1), (12.3, 1.1), "load: parse, optimise, allocate")
    _arrow(axes, (14.0, 1.1), (15.1, 2.0), "infer")
    rows = (
        ("compile", "module", ".wasm → machine code", "once, if ahead of time"),
        ("load", "module", "machine code → module", "at each start"),
        ("instantiate", "module", "module → instance with fresh memory", "at each start"),
        ("load", "model", "model file → session of the backend", "at each start"),
        ("call, infer", "both", "the first answer", "at each start"),
    )
    return _plot(
        figure,
        "Two ways to the first answer. The module's: compile, load, instantiate, call; only "
        "compiling moves to the time before the start. The model's: all of its loading is done at "
        "each start.",
        Table("From files to the first answer", ("step", "of", "what", "when"), rows),
    )


def parts(rows: Mapping[str, Mapping[str, float]], *, title: str, unit: str = "ms") -> Plot:
    """Show what a few numbers are made of.

    Parameters
    ----------
    rows : mapping of str to mapping of str to float
        Name → its parts, at most four, whose names are the same in all rows.
    title : str
    unit : str
    """
    names = list(next(iter(rows.values())))
    figure = Figure((_WIDTH, 1.3 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for name, colour in zip(names, (BLUE, ORANGE, GREEN, GREY), strict=False):
        widths = [row[name] for row in rows.values()]
        axes.barh(
            list(rows), widths, left=left, height=0.6, label=name, color=colour,
            hatch=_HATCHES[colour], edgecolor="black", lw=0.5,
        )  # fmt: skip
        left = [sum(pair) for pair in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(
            f"{total:,.4g}", (total, place), (4, 0), textcoords="offset points",
            va="center", fontsize=9,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel=unit)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    cells = tuple(
        (row, *(f"{numbers[name]:,.4g}" for name in names), f"{total:,.4g}")
        for (row, numbers), total in zip(rows.items(), left, strict=True)
    )
    return _plot(
        figure,
        f"Stacked bars: {title}. Each is made of {', '.join(names)}.",
        Table(f"{title} ({unit})", ("", *names, "total"), cells),
    )


def kernels(table: KernelTable) -> Plot:
    """Show how long each implementation of a step takes, as a multiple of the baseline.

    Parameters
    ----------
    table : edgelab.kernels.KernelTable
    """
    baseline = table.comparison.baseline
    rows = sorted(table.rows, key=lambda row: row.ratio.median)
    figure = Figure((_WIDTH, 1.0 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        found = row.ratio
        colour = ORANGE if row.fuel is not None else BLUE  # counted means: in Wasm
        around = [[found.median - found.low], [found.high - found.median]]
        axes.errorbar(
            found.median, place, xerr=around, fmt="s" if colour == ORANGE else "o", color=colour,
            ecolor="black", elinewidth=1, capsize=3, ms=6,
        )  # fmt: skip
        text = f"{found.median:#.3g}" if row.name != baseline else f"1 = {_time(row)}"
        axes.annotate(text, (found.high, place), (7, 0), textcoords="offset points", va="center",
                      fontsize=9)  # fmt: skip
    axes.set(
        xscale="log", yticks=range(len(rows)), yticklabels=[row.name for row in rows],
        xlabel=f"time, as a multiple of {baseline}; logarithmic. Whiskers: 95 % interval",
    )  # fmt: skip
    axes.invert_yaxis()
    axes.grid(axis="y", lw=0.5)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    names = {"s": ("in Wasm", ORANGE), "o": ("not in Wasm", BLUE)}
    handles = [
        Line2D([], [], marker=marker, color=colour, ls="", label=label)
        for marker, (label, colour) in names.items()
    ]
    axes.legend(handles=handles, frameon=False, fontsize=9)
    cells = tuple((row.name, _time(row), str(row.ratio)) for row in rows)
    return _plot(
        figure,
        f"Points on a logarithmic axis: the step {table.step}, as everybody does it. Fastest is "
        f"{rows[0].name}, slowest {rows[-1].name}.",
        Table(f"The step {table.step}", ("", "median", f"row / {baseline}"), cells),
    )


def _time(row: KernelRow) -> str:
    from edgelab.measure import duration

    return duration(row.summary.median_ms)


def nn_calls() -> Plot:
    """The five calls of WASI-NN: who asks whom, and what happens there."""
    calls = (
        ("load", "model bytes", "a graph", "the host finds the backend, which builds the model"),
        ("init_execution_context", "graph", "a context", "the backend prepares a run"),
        ("set_input", "context, tensor", "", "the host checks the tensor and notes where it lies"),
        ("compute", "context", "", "the backend reads the tensor there, and runs natively"),
        ("get_output", "context, buffer", "its size", "the host copies the result to the guest"),
    )
    figure = Figure((_WIDTH, 3.6))
    axes = _blank(figure, 16, 7.2)
    lanes = ((1.5, ORANGE, "guest"), (6.3, BLUE, "host"), (8.6, GREEN, "backend"))
    for x, colour, name in lanes:
        axes.plot((x, x), (0.2, 6.3), color=colour, lw=3, solid_capstyle="butt")
        _box(axes, x - 0.95, 6.3, 1.9, 0.7, colour, name)
    for row, (name, _, _, what) in enumerate(calls):
        y = 5.5 - row * 1.2
        _arrow(axes, (1.6, y), (6.2, y), name)
        if name in ("load", "init_execution_context", "compute"):
            axes.annotate("", (8.5, y), (6.4, y), arrowprops={"arrowstyle": "-|>", "lw": 1.4})
        axes.text(0.6, y, str(row + 1), va="center", ha="center", fontsize=10, weight="bold")
        axes.text(9.0, y, what, va="center", fontsize=8.5)
    rows = tuple((row + 1, *call) for row, call in enumerate(calls))
    return _plot(
        figure,
        "Five calls go from the guest to the host: load, init_execution_context, set_input, "
        "compute, get_output. For load, init_execution_context and compute the host asks the "
        "backend, which runs natively.",
        Table("The five calls", ("", "call", "takes", "gives, beside the errno", "what"), rows),
    )


def tensor_struct(raw: bytes, address: int) -> Plot:
    """Show the 20 bytes with which a guest describes a tensor.

    Parameters
    ----------
    raw : bytes
        Those 20 bytes.
    address : int
        Where they lie in the guest's memory.
    """
    names = ("dims: pointer", "dims: length", "type", "padding", "data: pointer", "data: length")
    sizes, colours = (4, 4, 1, 3, 4, 4), (BLUE, BLUE, GREEN, GREY, ORANGE, ORANGE)
    figure = Figure((_WIDTH, 1.4))
    axes = _blank(figure, 20.6, 3.6)
    at, rows = 0, []
    for name, size, colour in zip(names, sizes, colours, strict=True):
        field, value = raw[at : at + size], int.from_bytes(raw[at : at + size], "little")
        shown = "not read" if name == "padding" else f"{value:#x}" if "pointer" in name else value
        for k, byte in enumerate(field):
            axes.add_patch(
                Rectangle(
                    (at + k + 0.3, 1.5), 1, 1.1, facecolor=colour, alpha=0.25,
                    edgecolor="black", hatch=_HATCHES[colour], lw=0.5,
                )
            )  # fmt: skip
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
            axes.text(at + k + 0.8, 2.05, f"{byte:02x}", ha="center", va="center", fontsize=9,
                      family="monospace", bbox=box)  # fmt: skip
        axes.add_patch(
            Rectangle((at + 0.3, 1.5), size, 1.1, facecolor="none", edgecolor="black", lw=1.8)
        )
        middle = at + size / 2 + 0.3
        axes.text(middle, 3.0, name, ha="center", va="center", fontsize=9)
        axes.text(middle, 0.95, f"{shown:,}" if isinstance(shown, int) else shown, ha="center",
                  va="center", fontsize=9, weight="bold")  # fmt: skip
        axes.text(at + 0.3, 0.3, f"+{at}", ha="left", va="center", fontsize=8, color="#555555")
        rows.append((name, at, size, field.hex(" "), shown))
        at += size
    return _plot(
        figure,
        f"The 20 bytes of a tensor at {address:#x}: pointer and length of the dimensions, one byte "
        "for the type, three bytes of padding, pointer and length of the data.",
        Table(
            f"The tensor at {address:#x}", ("field", "offset", "bytes", "hex", "value"), tuple(rows)
        ),
    )


def pareto(seen: Evaluation, backend: str | None = None) -> Plot:
    """Show accuracy, speed and size of models in one picture.

    Parameters
    ----------
    seen : edgelab.evaluate.Evaluation
        With timings.
    backend : str, optional
        Whose timings; the default is the first.
    """
    backend = backend or next(iter(seen.timings))
    timing, base = seen.timings[backend], seen.scores[seen.baseline]
    shown = {name: seen.scores[name] for name in seen.scores if name in timing.ratios}
    level = base.top1.percent
    # A model that fell apart would squeeze all others into one line: it goes to the edge.
    floor = level - max(3.0, *(
        0.0, *(-s.difference.low_points for s in shown.values() if s.difference.points > -12)
    ))  # fmt: skip
    figure = Figure((_WIDTH, 4.4), layout="constrained")
    axes, legend = figure.subplots(1, 2, width_ratios=(2.1, 1))
    axes.axhline(level, color="black", lw=0.8, ls=":")
    axes.axvline(1, color="black", lw=0.8, ls=":")
    best = _not_dominated(seen, backend)
    lines, rows = [], []
    for number, (name, score) in enumerate(shown.items(), start=1):
        time, d = timing.ratios[name], score.difference
        off = score.top1.percent < floor
        x, y = time.median, floor if off else score.top1.percent
        colour = BLUE if name in best else GREY
        if not off and name != seen.baseline:
            axes.errorbar(
                x, y, xerr=([x - time.low], [time.high - x]),
                yerr=([d.points - d.low_points], [d.high_points - d.points]),
                color=colour, lw=1.2, capsize=3, zorder=2,
            )  # fmt: skip
        axes.scatter(
            x, y, s=900 * score.size_ratio, color=colour, marker="v" if off else "o",
            alpha=0.75, edgecolor="black", lw=1 if name in best else 0.4, zorder=3,
        )  # fmt: skip
        axes.annotate(
            str(number), (x, y), (0, 13 if number % 2 else -19), textcoords="offset points",
            ha="center", fontsize=9, weight="bold", zorder=4,
        )  # fmt: skip
        fallen = f", fell to {score.top1.percent:.1f} %" if off else ""
        lines.append(f"{number}  {name}\n    {score.size_ratio:.0%} of the bytes{fallen}")
        rows.append((
            number, name, f"{score.size_bytes:,}", str(score.top1), str(d), str(time), time.verdict,
            "yes" if name in best else "no",
        ))  # fmt: skip
    axes.set(
        xlabel=f"time / {seen.baseline}, {backend} (left is faster)",
        ylabel="top-1, % (bars: 95 % interval of the\npaired difference to the dotted line)",
    )
    axes.margins(0.16)
    axes.spines[["top", "right"]].set_visible(False)
    legend.axis("off")
    legend.text(0, 1, "\n".join(lines), va="top", fontsize=8.5, transform=legend.transAxes)
    columns = ("", "model", "bytes", "top-1", "points", "time / baseline", "verdict", "not beaten")
    return _plot(
        figure,
        f"Accuracy against time for {len(shown)} models on {len(seen.batch):,} pictures in "
        f"{backend}; areas are file sizes. Blue: no other model is shown to be better in accuracy, "
        f"time or size without being worse in another: {', '.join(best)}. Grey: one is.",
        Table(f"Accuracy, speed and size; timed in {backend}", columns, tuple(rows)),
    )


def _not_dominated(seen: Evaluation, backend: str) -> list[str]:
    """Models that no other one beats: noise, and 2 % of size, make no winner."""
    timing = seen.timings[backend]
    shown = [s for name, s in seen.scores.items() if name in timing.ratios]

    def beats(other: Score, mine: Score) -> bool:
        theirs, own = timing.ratios[other.name], timing.ratios[mine.name]
        accuracy = seen.between(mine.name, other.name).verdict
        no_worse = (
            accuracy != "worse"
            and other.size_bytes <= 1.02 * mine.size_bytes
            and theirs.low <= own.high
        )
        better = (
            accuracy == "better"
            or 1.02 * other.size_bytes < mine.size_bytes
            or theirs.high < own.low
        )
        return no_worse and better

    return [s.name for s in shown if not any(beats(other, s) for other in shown)]


def flips(seen: Evaluation, name: str, count: int = 8) -> Plot:
    """Show pictures that a model and the baseline see differently, and what each says.

    Those that changed sides come first: one of the two is right.

    Parameters
    ----------
    seen : edgelab.evaluate.Evaluation
    name : str
        The model.
    count : int
        How many at most.
    """
    sides = seen.flips(name)
    others = [flip for flip in seen.flips(name, sides=False) if flip not in sides]
    chosen, names = [*sides, *others][:count], seen.batch.spec.labels
    columns = 4
    lines = max(1, -(-len(chosen) // columns))
    figure = Figure(
        (_WIDTH, 2.75 * lines if chosen else 1), layout="constrained" if chosen else None
    )
    rows = []
    for place, flip in enumerate(chosen, start=1):
        axes = figure.add_subplot(lines, columns, place)
        axes.imshow(seen.batch.images[flip.index])
        axes.axis("off")
        said = [(seen.baseline, flip.before), (name, flip.after)]
        axes.set_title(f"{names[flip.label]}", fontsize=9, weight="bold")
        for line, (who, what) in enumerate(said):
            mark = "✔" if what == flip.label else "✘"
            text = f"{who}: {names[what]} {mark}"
            axes.text(
                0.5, -0.05 - 0.11 * line, text if len(text) <= 32 else text[:31] + "…",
                transform=axes.transAxes, ha="center", va="top", fontsize=7.5,
            )  # fmt: skip
        rows.append((flip.index, names[flip.label], names[flip.before], names[flip.after]))
    if not chosen:
        axes = _blank(figure, 16, 2)
        axes.text(8, 1, f"{name} sees every picture as {seen.baseline} does.", ha="center")
    lost, gained = seen.scores[name].difference.lost, seen.scores[name].difference.gained
    return _plot(
        figure,
        f"{len(chosen)} pictures that {seen.baseline} and {name} see differently. Of "
        f"{len(seen.batch):,}, {lost} are right only in {seen.baseline}, and {gained} only in "
        f"{name}.",
        Table(
            "What flipped",
            ("picture", "shows", f"{seen.baseline} says", f"{name} says"),
            tuple(rows),
        ),
    )


def sensitivity(per_tensor: Sensitivity, per_channel: Sensitivity) -> Plot:
    """Show where two ways to quantize a model lose precision, layer by layer.

    Parameters
    ----------
    per_tensor, per_channel : edgelab.quantize.Sensitivity
        Of the same model.
    """
    figure = Figure((_WIDTH, 5.6), layout="constrained")
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(1.2, 1.2, 0.8))
    places = range(len(per_tensor.layers))
    ways = (("one scale a tensor", per_tensor, ORANGE, "v"),
            ("one scale a channel", per_channel, BLUE, "o"))  # fmt: skip
    for name, seen, colour, marker in ways:
        weights = [math.nan if layer.weight_sqnr_db is None else layer.weight_sqnr_db
                   for layer in seen.layers]  # fmt: skip
        outputs = [layer.activation_sqnr_db for layer in seen.layers]
        for axes, values in ((upper, weights), (middle, outputs)):
            axes.plot(places, values, marker=marker, ms=4, lw=1, color=colour, label=name)
    # Weights that fit their scales exactly would squeeze all others into one line.
    known = [layer.weight_sqnr_db or 0.0 for _, seen, _, _ in ways for layer in seen.layers]
    top = max([value for value in known if value < 100], default=100.0)
    upper.set(ylabel="weights, dB", ylim=(None, top * 1.12))
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=2,
                  frameon=False)  # fmt: skip
    middle.set(ylabel="layer's output, dB")
    deep = ["depthwise" in layer.kind for layer in per_tensor.layers]
    ratios = [layer.range_ratio for layer in per_tensor.layers]
    for chosen, colour, name in ((True, ORANGE, "depthwise"), (False, GREY, "other layers")):
        lower.bar(
            [k for k in places if deep[k] is chosen], [r for k, r in enumerate(ratios)
            if deep[k] is chosen], color=colour, hatch=_HATCHES[colour], edgecolor="black", lw=0.4,
            label=name,
        )  # fmt: skip
    lower.set(ylabel="largest channel\n/ median", xlabel="layer, in the order of execution")
    lower.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 0.92))
    for axes in (upper, middle, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    low = per_tensor.worst(1)[0]
    rows = tuple(
        (
            a.name, a.kind, *(_decibels(v) for v in (a.weight_sqnr_db, b.weight_sqnr_db,
            a.activation_sqnr_db, b.activation_sqnr_db)), f"{a.range_ratio:.1f}",
        )
        for a, b in zip(per_tensor.layers, per_channel.layers, strict=True)
    )  # fmt: skip
    columns = ("layer", "kind", "weights, tensor", "weights, channel", "output, tensor",
               "output, channel", "largest / median")  # fmt: skip
    return _plot(
        figure,
        f"Signal to quantization noise of {len(rows)} layers. With one scale a tensor the weights "
        f"of {low.name} ({low.kind}) are the noisiest, {_decibels(low.weight_sqnr_db)} dB; the "
        f"model's output has {per_tensor.output_sqnr_db:.1f} dB, against "
        f"{per_channel.output_sqnr_db:.1f} dB with one scale a channel.",
        Table("Signal to quantization noise, dB", columns, rows),
    )


def _decibels(value: float | None) -> str:
    return "float" if value is None else f"{value:.1f}"


def ratios(results: Results) -> Plot:
    """Show each row of a benchmark as a ratio to its baseline, with its interval.

    Parameters
    ----------
    results : edgelab.results.Results
    """
    sections = [s for s in results.sections.values() if any(row.ratio for row in s.rows)]
    paired = [[row for row in s.rows if row.ratio] for s in sections]
    heights = [len(rows) + 1.2 for rows in paired]
    figure = Figure((_WIDTH, 0.9 + 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(
        max(len(sections), 1), 1, sharex=True, squeeze=False, height_ratios=heights or None
    )[:, 0]
    looks = {"faster": (BLUE, "<"), "slower": (ORANGE, ">"), "no winner": (GREY, "s")}
    cells = []
    for axes, section, rows in zip(panels, sections, paired, strict=False):
        if section.noise:
            axes.axvspan(section.noise.low, section.noise.high, color=GREY, alpha=0.3, lw=0)
        axes.axvline(1, color="black", lw=1)
        for place, row in enumerate(rows):
            each = row.ratio
            assert each is not None
            colour, marker = looks[each.verdict]
            axes.plot((each.low, each.high), (place, place), color=colour, lw=3, alpha=0.7,
                      solid_capstyle="butt")  # fmt: skip
            axes.plot(each.median, place, marker, color=colour, ms=7, mec="black", mew=0.6)
            axes.annotate(
                f"{each}", (1.01, place), xycoords=("axes fraction", "data"), va="center",
                fontsize=8, annotation_clip=False,
            )  # fmt: skip
            cells.append((section.name, row.name, row.baseline, str(each), each.verdict))
        bases = {row.baseline for row in rows}
        title = section.name + (f": row / {rows[0].baseline}" if len(bases) == 1 else "")
        names = [row.name if len(bases) == 1 else f"{row.name} / {row.baseline}" for row in rows]
        axes.set(xscale="log", yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6))
        axes.set_yticklabels(names, fontsize=8)
        axes.set_title(title, fontsize=9, loc="left", weight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", lw=0.4)
    if len(sections):
        panels[-1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        panels[-1].xaxis.set_major_formatter("{x:g}")
        panels[-1].xaxis.set_minor_formatter("")
        panels[-1].set_xlabel(
            "time as a ratio to the baseline, log scale; bar: 95 % interval; grey: A/A check",
            fontsize=8,
        )
        marks = [
            Line2D([], [], color=colour, marker=marker, ls="", mec="black", mew=0.6, label=verdict)
            for verdict, (colour, marker) in looks.items()
        ]
        figure.legend(handles=marks, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    faster = sum(cell[-1] == "faster" for cell in cells)
    slower = sum(cell[-1] == "slower" for cell in cells)
    columns = ("section", "row", "baseline", "ratio, 95 % interval", "verdict")
    return _plot(
        figure,
        f"{len(cells)} ratios of times, each with its interval: {faster} faster than their "
        f"baseline, {slower} slower, for {len(cells) - faster - slower} no winner can be called.",
        Table("Ratios of times", columns, tuple(cells)),
    )


_WALK_PARTS = {
    "decode": (GREY, ("decode",)),
    "load guest and model": (BLUE, ("load",)),
    "exchange, postprocess": (ORANGE, ("exchange", "postprocess")),
    "preprocess": (GREEN, ("preprocess",)),
    "infer": (RED, ("infer",)),
}


def waterfall(walk: Walk) -> Plot:
    """Show what each request takes, from the naive way to the last improvement.

    Parameters
    ----------
    walk : edgelab.waterfall.Walk
    """
    few = [step for step in walk.steps if step.total.median > 8] or list(walk.steps[-1:])
    figure = Figure((_WIDTH, 2.2 + 0.3 * (len(walk.steps) + len(few))), layout="constrained")
    heights = (len(walk.steps) + 1, len(few) + 1)
    whole, tail = figure.subplots(2, 1, height_ratios=heights)
    _walk_bars(whole, walk.steps)
    _walk_bars(tail, few)
    whole.set_title(
        f"One photo, from file to label, model {walk.model}; each step adds to those above",
        fontsize=10, loc="left",
    )  # fmt: skip
    tail.set_title("The last steps, enlarged", fontsize=10, loc="left")
    tail.set_xlabel("ms: median of each stage")
    figure.legend(
        *whole.get_legend_handles_labels(), loc="outside lower center", ncols=len(_WALK_PARTS),
        frameon=False, fontsize=8.5,
    )  # fmt: skip
    rows = tuple(
        (
            step.name,
            *(f"{_walk_ms(step, stages):.3g}" for _, stages in _WALK_PARTS.values()),
            f"{step.summary.median_ms:.3g}",
            f"{100 / step.total.median:.1f}",
            "" if step.gain is None else str(step.gain),
        )
        for step in walk.steps
    )
    columns = ("step", *_WALK_PARTS, "total", "of 100", "times as fast as the step before")
    return _plot(
        figure,
        f"Stacked bars that become shorter from {walk.steps[0].name} to {walk.steps[-1].name}: the "
        f"last step is {walk.total.median:.0f} times as fast as the first.",
        Table("Milliseconds", columns, rows),
    )


def _walk_ms(step: Step, stages: Sequence[str]) -> float:
    return sum(step.stages[stage].median_ms for stage in stages)


def _walk_bars(axes: Axes, steps: Sequence[Step]) -> None:
    names = [step.name if step.gain is None else f"+ {step.name}" for step in steps]
    left = [0.0] * len(steps)
    for part, (colour, stages) in _WALK_PARTS.items():
        widths = [_walk_ms(step, stages) for step in steps]
        axes.barh(
            names, widths, left=left, height=0.66, label=part, color=colour,
            hatch=_HATCHES[colour], edgecolor="black", lw=0.4,
        )  # fmt: skip
        left = [sum(pair) for pair in zip(left, widths, strict=True)]
    for place, (step, end) in enumerate(zip(steps, left, strict=True)):
        axes.annotate(
            f"{step.summary.median_ms:.3g} ms   {100 / step.total.median:.3g} of 100", (end, place),
            (4, 0), textcoords="offset points", va="center", fontsize=8.5,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def latencies(runs: Mapping[str, Load]) -> Plot:
    """Show how long requests took: all of them at the left, the slowest ones at the right.

    Parameters
    ----------
    runs : mapping of str to edgelab.load.Load
        At most four.
    """
    figure = Figure((_WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    looks = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (GREY, ":", "D"))
    for (name, run), (colour, style, marker) in zip(runs.items(), looks, strict=False):
        times = sorted(run.samples_ms)
        slower = [100 * (1 - k / len(times)) for k in range(len(times))]
        axes.plot(
            [*slower, 0.01], [*times, times[-1]], style, color=colour, lw=2,
            drawstyle="steps-post", label=name,
        )  # fmt: skip
        marks = {100 - float(q[1:]): ms for q, ms in run.latency_ms.items() if q != "max"}
        axes.plot(list(marks), list(marks.values()), marker, color=colour, mec="black", ms=6)
    axes.set(
        xscale="log", yscale="log", xlim=(100, 0.09), ylabel="ms",
        xlabel="% of the requests took longer (marks: p50, p90, p99, p99.9)",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.10g}")
    axes.grid(lw=0.4)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    names = next(iter(runs.values())).latency_ms
    rows = tuple(
        (name, f"{run.sent:,}", *(f"{run.latency_ms[q]:.1f}" for q in names))
        for name, run in runs.items()
    )
    worst = max(runs, key=lambda name: runs[name].latency_ms["p99"])
    return _plot(
        figure,
        f"Lines: latency by the share of requests that took longer. The longest tail: {worst}.",
        Table("Latency, milliseconds", ("", "requests", *names), rows),
    )


def stacked(*plots: Plot) -> Plot:
    """Put figures one below the other; the table is the last one's."""
    from PIL import Image

    sheets = [Image.open(io.BytesIO(plot.png)).convert("RGB") for plot in plots]
    width, height = max(s.width for s in sheets), sum(s.height for s in sheets)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for each in sheets:
        sheet.paste(each, (0, top))
        top += each.height
    png = io.BytesIO()
    sheet.quantize(256).save(png, "PNG", optimize=True)
    return Plot(" ".join(plot.alt for plot in plots), plots[-1].table, png.getvalue())
