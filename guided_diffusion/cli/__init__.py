"""The command line: flags, messages and exit statuses. Nothing below this package knows of them."""


def sddm() -> None:
    """The console command `sddm`: scripts/ae_sample.py, but for flags of the release that have no effect."""
    from .main import run, start

    start()  # before torch is imported
    from .sampling import translate_command

    text = "Translate every image under --base_samples into the domain of --model_path (SDDM, ICML 2023)."
    translate, create_parser = translate_command("sddm", text, first=("blocks", "range_t"))
    parser = create_parser()
    parser.usage = str(parser.usage).replace("python scripts/", "")
    run(translate, parser)
