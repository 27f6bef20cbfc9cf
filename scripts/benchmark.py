"""Compare methods: sample with every method, setting and seed of a table, evaluate, and show published results beside.

Each line of the table is a row to sample, as in scripts/cat2dog.sh:

    method | setting | script and its flags | published FID | published SSIM

The last two columns are optional, and # starts a comment. Every row is sampled with every seed, in its own process, on
the same references and with the same model. To resume an interrupted benchmark, run the same command again.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]  # found from any working directory

from guided_diffusion.cli import main as command

command.start()

import comparison
import rows

from guided_diffusion.cli.extensions import Extensions
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.evaluation import Evaluation

SAMPLING = ("flags", "batch_size", "device", "processes", "launch")
EVALUATION = ("features", "trust_features", "inception_path", "protocol", "image_size", "lpips")


def create_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add(comparison.Compared, title="comparison", without=SAMPLING)
    parser.add(comparison.Compared, title="sampling", only=SAMPLING)
    parser.add(Evaluation, title="evaluation", only=EVALUATION)
    parser.add(Extensions, title="extensions")
    return parser


def compare(given: Given) -> None:
    given.options(Extensions).load()
    options = given.options(comparison.Compared)
    options, chosen = comparison.select(options, rows.read_table(options.table))
    folders = {"sources": options.base_samples, "targets": options.targets, "truth": options.truth}
    measured = given.options(Evaluation, **folders, device=options.device)
    comparison.check_files(options, measured, chosen)
    compared = comparison.Comparison(options, measured)
    text = compared.write(compared.run(chosen))
    command.say(text.rstrip("\n"), sys.stdout)
    command.say(f"report: {os.path.join(options.save_dir, 'report.html')}", sys.stdout)


if __name__ == "__main__":
    command.run(compare, create_parser(), ranks="none")
