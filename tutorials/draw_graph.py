"""A drawing of a Q/DQ graph: the operators from top to bottom, and whose every Q and DQ is.

An operator is a box with its ``quantization_tag``; the DQ nodes that feed it and the Q node that rounds its
result are small pills above and below. One colour for each tag. Long graphs go on in the next column.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch.export import ExportedProgram
from torch.fx import Node

# inches, from the middle of a column and from the top of a cell
WIDTH, HEIGHT = 3.75, 1.3
DQ, BOX, Q = 0.12, 0.55, 0.97
WEIGHT, WEIGHT_DQ, SECOND_DQ = -1.25, -0.3, 0.5
LANE, GAP = 1.35, 1.8  # of an edge around some cells, and between two columns
TAG = "quantization_tag"
EDGE = {"color": "0.35", "linewidth": 0.9}


@dataclass
class Cell:
    """An operator (or an input or output of the program) with the DQ nodes before it and the Q node after it."""

    node: Node
    weight: Node | None = None  # the DQ of a constant
    inputs: list[tuple[Node | None, Node]] = field(default_factory=list)  # DQ, and the operator it comes from
    quantize: Node | None = None


def _is_called(node: Node, name: str) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "").startswith(name)


def read(program: ExportedProgram) -> list[Cell]:
    """The cells in the order of the graph."""
    inputs = program.graph_signature.user_inputs
    cells: dict[Node, Cell] = {}
    owner: dict[Node, Node] = {}  # Q -> its operator
    for node in program.graph.nodes:
        if _is_called(node, "quantize_per"):
            operator = node.all_input_nodes[0]
            owner[node] = operator
            cells[operator].quantize = node
        elif not _is_called(node, "dequantize_per") and (node.op != "placeholder" or node.name in inputs):
            cell = cells[node] = Cell(node)
            for source in node.all_input_nodes:
                before = source.all_input_nodes[0] if _is_called(source, "dequantize_per") else source
                if before in owner:
                    cell.inputs.append((source, owner[before]))
                elif before in cells:
                    cell.inputs.append((None, before))
                elif source is not before:
                    cell.weight = source
    return list(cells.values())


def columns(cells: list[Cell], count: int) -> list[list[Cell]]:
    """``count`` columns of about the same length, cut where a single edge crosses."""
    place = {cell.node: number for number, cell in enumerate(cells)}
    edges = [(place[source], place[cell.node]) for cell in cells for _, source in cell.inputs]
    cuts = [cut for cut in range(1, len(cells)) if sum(start < cut <= end for start, end in edges) == 1]
    ends = [min(cuts, key=lambda cut: abs(cut - part * len(cells) / count), default=0) for part in range(1, count)]
    bounds = [0, *sorted(set(ends)), len(cells)]
    return [cells[start:end] for start, end in pairwise(bounds) if start < end]


def draw_graph(program: ExportedProgram, path: Path, title: str, count: int = 2) -> None:
    """Draw the program in ``count`` columns."""
    parts = columns(read(program), count)
    width, height = WIDTH * len(parts), HEIGHT * max(map(len, parts)) + 0.9
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.axis("off")
    axes.text(0.15, 0.25, title, fontsize=13, weight="bold", va="center")
    legend = "Q rounds to integers, DQ makes real numbers of them again. One colour for each quantization_tag."
    axes.text(0.15, 0.5, legend, fontsize=9, va="center", color="0.25")
    Drawing(axes, parts).draw()
    figure.savefig(path, dpi=130)


class Drawing:
    """The cells at their places."""

    def __init__(self, axes: Axes, parts: list[list[Cell]]) -> None:
        self.axes = axes
        self.cells = [cell for part in parts for cell in part]
        self.place = {
            cell.node: (number, row, WIDTH * (number + 0.5), HEIGHT * row + 0.85)
            for number, part in enumerate(parts)
            for row, cell in enumerate(part)
        }
        self.order = {cell.node: number for number, cell in enumerate(self.cells)}
        self.quantize = {cell.node: cell.quantize for cell in self.cells}
        tags = dict.fromkeys(tag for cell in self.cells if (tag := cell.node.meta.get(TAG)))
        # neighbours in the order of the graph get hues far apart
        self.colours = {tag: colorsys.hsv_to_rgb(number * 0.382 % 1, 0.38, 0.97) for number, tag in enumerate(tags)}

    def draw(self) -> None:
        for cell in self.cells:
            _, _, x, top = self.place[cell.node]
            tag = cell.node.meta.get(TAG)
            label = getattr(cell.node.target, "_opname", cell.node.name)
            self.box(x, top + BOX, 2.1, 0.42, cell.node, f"{label}\n" if tag else label, 9)
            self.axes.text(x, top + BOX + 0.09, tag, fontsize=7.5, ha="center", va="center")
            if cell.weight is not None:
                self.weight(cell.weight, x, top)
            if cell.quantize is not None:
                self.line((x, top + BOX + 0.21), (x, top + Q - 0.1))
                self.pill(x, top + Q, cell.quantize, "Q")
                self.axes.text(x - 0.3, top + Q, _parameters(cell.quantize), fontsize=6.5, ha="right", va="center")
            nearest_first = sorted(cell.inputs, key=lambda pair: -self.order[pair[1]])
            for number, (dequantize, source) in enumerate(nearest_first):
                self.edge(cell, dequantize, source, number)

    def edge(self, cell: Cell, dequantize: Node | None, source: Node, number: int) -> None:
        """From an operator to a later one: straight down, around what is between, or to the next column."""
        column, row, x, top = self.place[cell.node]
        from_column, from_row, from_x, from_top = self.place[source]
        start = from_top + (BOX + 0.21 if self.quantize[source] is None else Q + 0.1)
        at = x + SECOND_DQ * number - WEIGHT_DQ * (cell.weight is not None)
        end = top + (BOX - 0.21 if dequantize is None else DQ - 0.1)
        if dequantize is not None:
            self.line((at, top + DQ + 0.1), (at, top + BOX - 0.21))
            self.pill(at, top + DQ, dequantize, "DQ")
        if column != from_column:
            gap = from_x + GAP
            down, up = start + 0.12, end - 0.12
            self.line((from_x, start), (from_x, down), (gap, down), (gap, up), (at, up), (at, end))
        elif row == from_row + 1:
            middle = (start + end) / 2
            self.line((from_x, start), (from_x, middle), (at, middle), (at, end))
        else:
            lane = x + LANE
            self.line((from_x + 0.21, start - 0.1), (lane, start - 0.1), (lane, end + 0.1), (at + 0.21, end + 0.1))

    def weight(self, dequantize: Node, x: float, top: float) -> None:
        shape = "×".join(map(str, dequantize.meta["val"].shape))
        integers = str(dequantize.all_input_nodes[0].meta["val"].dtype).removeprefix("torch.")
        self.line((x + WEIGHT + 0.53, top + DQ), (x + WEIGHT_DQ - 0.21, top + DQ))
        self.box(x + WEIGHT, top + DQ, 1.06, 0.22, None, f"{integers} {shape}", 6.5)
        self.line((x + WEIGHT_DQ, top + DQ + 0.1), (x + WEIGHT_DQ, top + BOX - 0.21))
        self.pill(x + WEIGHT_DQ, top + DQ, dequantize, "DQ")

    def pill(self, x: float, y: float, node: Node, text: str) -> None:
        self.box(x, y, 0.42, 0.2, node, text, 7, rounding=0.1)

    def box(
        self, x: float, y: float, width: float, height: float, node: Node | None, text: str, size: float, rounding=0.04
    ) -> None:
        tag = None if node is None else node.meta.get(TAG)
        style = f"round,pad=0,rounding_size={rounding}"
        colour = self.colours.get(tag, "white")
        corner = (x - width / 2, y - height / 2)
        self.axes.add_patch(FancyBboxPatch(corner, width, height, style, facecolor=colour, edgecolor="0.3", zorder=2))
        self.axes.text(x, y, text, fontsize=size, ha="center", va="center", zorder=3)

    def line(self, *points: tuple[float, float]) -> None:
        (x, y), end = points[-2:]
        self.axes.plot(*zip(*points, strict=True), solid_joinstyle="round", zorder=1, **EDGE)
        self.axes.annotate("", end, (x, y), arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **EDGE})


def _parameters(quantize: Node) -> str:
    _, scale, zero_point, _, _, dtype = quantize.args
    return f"{str(dtype).removeprefix('torch.')}, scale {scale:.3g}, zero {zero_point}"
