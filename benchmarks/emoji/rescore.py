"""Score the search's candidates once more, in the domain-specific extractor's features.

The demo model's own features, in which the search measures, tell what a picture shows better than how it is drawn. The
extractor was trained to tell the two ways of drawing apart. It also guides EGSDE, which it therefore favours. Nothing
is chosen by these numbers; they show every method's whole trade-off, not one setting of it.

    python benchmarks/emoji/search.py && python benchmarks/emoji/rescore.py

It writes search_extractor.svg and search_extractor.md beside this file.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import publish
import search

from guided_diffusion.evaluation import charts


def text_of(rows):
    """search_extractor.md: every candidate, and which of them search.RULE would choose by these numbers."""
    lines = ["# Search of settings, emoji: in the extractor's features", ""]
    lines += ["| method | setting | SSIM to truth ↑ | Fréchet, extractor's features ↓ | called 3D ↑ | sum of ranks | |"]
    lines += ["|---" * 7 + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [(row["setting"], row["mean"]) for row in rows if row["method"] == method]
        winner, sums = search.choose([(mean["truth_ssim"], mean["fid"]) for _, mean in own])
        for k, (setting, mean) in enumerate(own):
            cells = [method, setting, f"{mean['truth_ssim']:.4f}", f"{mean['fid']:.1f}", f"{mean['called_3d']:.3f}"]
            lines.append("| " + " | ".join([*cells, str(sums[k]), "would be chosen" if k == winner else ""]) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_dir", type=Path, default=ROOT / "output_emoji_search", help="what search.py wrote")
    publish.add_common_flags(parser)
    args = parser.parse_args()
    runs = args.save_dir / "runs"
    rows = publish.read_rows(runs, "search.py")
    if rows is None:
        return 2
    ruler = publish.Ruler(args.data / "fluent3d" / "train", args.dsepath)
    for row in rows:
        score = ruler.score([ruler.measure(runs / row["folder"], paired=False)])
        row["mean"] |= {"fid": score["extractor"], "called_3d": score["called_3d"]}
    chart = charts.trade_off(rows, "truth_ssim").file()
    (args.out / "search_extractor.svg").write_text(chart, encoding="utf-8")
    text = text_of(rows)
    (args.out / "search_extractor.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
