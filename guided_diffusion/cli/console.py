"""Translate every image under --base_samples into the domain of --model_path (SDDM, ICML 2023)."""


def main() -> None:
    """The console command `sddm`: scripts/ae_sample.py, but for flags of the release that have no effect."""
    from .main import run, start

    start()  # before torch is imported
    from .sampling import translate_command

    translate, create_parser = translate_command("sddm", str(__doc__), first=("blocks", "range_t"))
    parser = create_parser()
    parser.usage = str(parser.usage).replace("python scripts/", "")
    run(translate, parser)
