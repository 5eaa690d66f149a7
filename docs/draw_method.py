"""Draws docs/explanation/method.svg: ``python docs/draw_method.py``."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, ORANGE, GREEN, GREY, TEXT = "#dbe9f6", "#fbe6cc", "#d9efdf", "#eceff3", "#1c2128"


def main() -> None:
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "method", "font.family": "sans-serif"}
    figure = Figure(figsize=(11, 5.6), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 110), ylim=(0, 56))
    axis.set_axis_off()

    def box(x: float, y: float, width: float, height: float, text: str, colour: str, size: float = 10) -> None:
        axis.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1.2", fc=colour, ec=TEXT, lw=0.8)
        )
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=TEXT)

    def arrow(start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, style: str = "-") -> None:
        axis.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle="-|>", mutation_scale=11, lw=1, color=TEXT, ls=style,
                connectionstyle=f"arc3,rad={bend}",
            )
        )  # fmt: skip

    box(1, 24, 13, 9, "patch x\nand its place\nin the volume", GREY)
    box(20, 40, 17, 11, "views, made smaller\ndown(I), down(V)\n1/s of the edge", BLUE)
    box(20, 5, 17, 11, "views, full size\nI, V", ORANGE)
    box(43, 40, 13, 11, "encoder", BLUE)
    box(43, 5, 13, 11, "encoder\n(same weights)", ORANGE)
    box(62, 40, 15, 11, "first K decoder\nstages", BLUE)
    box(62, 5, 15, 11, "projector", ORANGE)
    box(84, 44, 25, 8, "L_g   image level\npatches at one place are alike", GREEN)
    box(84, 24, 25, 8, "L_d   pixel level\nthe same at each grid point", GREEN)
    box(84, 4, 25, 8, "L_ER   feature level\nsmall and full size agree", GREEN)
    arrow((14, 30), (20, 44), -0.15)
    arrow((14, 27), (20, 12), 0.15)
    for y in (45.5, 10.5):
        arrow((37, y), (43, y))
        arrow((56, y), (62, y))
    arrow((49.5, 40), (49.5, 16), style="--")
    arrow((49.5, 16), (49.5, 40), style="--")
    axis.text(51, 28, "shared", fontsize=9, color=TEXT, va="center")
    arrow((77, 47), (84, 48))
    arrow((77, 43), (84, 30), 0.1)
    arrow((77, 13), (84, 46), 0.1)
    arrow((77, 11), (84, 26), -0.1)
    arrow((53, 5), (84, 5.5), 0.12)
    axis.text(20, 53, "dominant branch", fontsize=11, weight="bold", color=TEXT)
    axis.text(20, 18, "auxiliary branch", fontsize=11, weight="bold", color=TEXT)
    axis.text(
        1,
        1,
        "I: the patch itself.  V: mirrored, turned, scaled, moved.  L_ER is computed at the bottleneck of both.",
        fontsize=9,
    )
    figure.savefig(Path(__file__).parent / "explanation" / "method.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
