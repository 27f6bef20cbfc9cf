"""Compare methods: sample with every method, setting and seed of a table, evaluate, and set published results beside.

The table says how each row is sampled; scripts/cat2dog.sh and its neighbours hold one each. A line is

    method | setting | script and its flags | published FID | published SSIM

where the last two may be missing and # begins a comment. Every row is sampled with every seed, in a process of its own,
on the same references and with the same model. A run that was killed resumes when the same command is started again.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory

from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli import comparison, rows
from guided_diffusion.cli.extensions import Extensions
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.errors import InputError
from guided_diffusion.evaluation import Evaluation

SAMPLING = ("flags", "batch_size", "device", "processes", "launch")
EVALUATION = ("features", "trust_features", "inception_path", "protocol", "image_size", "lpips")


def create_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add(comparison.Compared, title="what is compared", without=SAMPLING)
    parser.add(comparison.Compared, title="how it is sampled", only=SAMPLING)
    parser.add(Evaluation, title="how it is evaluated", only=EVALUATION)
    parser.add(Extensions, title="extensions")
    return parser


def compare(given: Given) -> None:
    given.options(Extensions).load()
    options = given.options(comparison.Compared)
    options, chosen = comparison.select(options, rows.read_table(options.table))
    folders = {"sources": options.base_samples, "targets": options.targets, "truth": options.truth}
    measured = given.options(Evaluation, **folders, device=options.device)
    missing = comparison.missing_files(options, measured) + rows.missing_files(chosen)
    if missing:
        raise InputError(f"missing: {'; '.join(missing)}")
    compared = comparison.Comparison(options, measured)
    text = compared.write(compared.run(chosen))
    command.say(text.rstrip("\n"), sys.stdout)
    command.say(f"report: {os.path.join(options.save_dir, 'report.html')}", sys.stdout)


if __name__ == "__main__":
    command.run(compare, create_parser(), ranks="none")
