"""The page in Gradio. Nothing leaves the machine, and no file but uploads, results and examples can be read."""

import contextlib
import inspect
import logging
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

try:
    import gradio as gr  # type: ignore[import-not-found]
except ImportError as error:
    raise ImportError("the web demo needs gradio: pip install -r requirements-demo.txt") from error

from ..errors import InputError
from ..image_datasets import ImageError, list_references
from ..methods import energy_names
from ..runtime import PRECISIONS
from ..sddm import VARIANTS
from ..solvers import SOLVERS
from .translate import (
    MOST_RESULTS,
    RECOMMENDED,
    Frame,
    Model,
    Settings,
    Studio,
    explain,
    label,
    looks_like_a_photograph,
)  # fmt: skip

TITLE = "Repaint a picture in another style"
INTRODUCTION = (
    "Choose a picture and press **Translate**. A diffusion model that knows only one kind of picture repaints it as "
    "one of that kind, with the same layout and colours."
)
PHOTOGRAPH = "This looks like a photograph. The demo's model knows only emoji, so simple drawings work better."

STYLE = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
#preview, .compare { width: 100%; max-width: 440px; margin: 0 auto; aspect-ratio: 1; }
#preview .image-container, #preview .image-container > button, #preview .image-frame { width: 100%; height: 100%; }
#preview img { width: 100%; height: 100%; object-fit: contain; }
#results { display: grid; grid-template-columns: repeat(auto-fit, minmax(45%, 1fr)); }
#results > .column { gap: 6px; }
#results > .column:not(:has(.compare:not(.hidden))) { display: none; }
#examples .gallery-item .container, #examples .gallery-item img { width: 3.6rem; height: 3.6rem; }
#command textarea { font-family: var(--font-mono); font-size: var(--text-sm); }
@media (max-width: 640px) {  /* a phone shows the source and the results without scrolling */
  #about h1 { font-size: var(--text-lg); margin: 0; }
  #about p { font-size: var(--text-sm); }
  #work { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
  #work > .column { display: contents; }
  #work > .column > * { grid-column: 1 / -1; min-width: 0; }
  #work #picture { grid-column: 1; grid-row: 1; }
  #picture, #picture .image-container { height: 130px !important; min-height: 0 !important; }
  #work #buttons { grid-column: 2; grid-row: 1; flex-direction: column; }
  #buttons button { width: 100%; }
  #work #examples, #work .form:has(#count) { order: 1; }
  #results { gap: 8px; }
  #preview, .compare { max-width: 310px; }
}
"""


class Upload(NamedTuple):
    """A picture file, and the name that it had on the visitor's machine."""

    path: str
    name: str


Command = Callable[[str, Upload, Settings], str]


def build(studio: Studio, command: Command, *, examples: str | None = None, note: str = "", **defaults: Any) -> Any:
    """The page as a `gr.Blocks`.

    command: gives the equivalent command. examples: a folder of pictures. note: a line on what the models are for.
    defaults: of `Settings`.
    """
    first = next(iter(studio.models.values()))
    wanted = Settings(**defaults)
    energies = ["dct", "low_pass", *["vgg"] * os.path.exists(studio.weights)]
    area, steps = first.nearest_area(wanted.area), min(wanted.steps, first.most_steps)
    settings = replace(wanted, area=area, steps=steps)
    helps = {field.name: field.metadata["help"] for field in fields(Settings)}
    pictures = [reference.path for reference in list_references(examples, parameter="examples")] if examples else []

    def control(kind: Callable, name: str, *arguments: Any, **options: Any) -> Any:
        """A component for a setting, with its label, help text and default."""
        known = {"label": label(name), "info": helps.get(name), "value": getattr(settings, name, None)}
        return kind(*arguments, **{**known, **options})

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {TITLE}\n{INTRODUCTION} {note}", elem_id="about")
        with gr.Row(elem_id="work"):
            with gr.Column(min_width=300):
                picture = gr.Image(
                    pictures[0] if pictures else None, label=label("picture"), type="filepath", image_mode=None,
                    sources=["upload", "clipboard"], height=300, buttons=[], elem_id="picture",
                )  # fmt: skip
                setattr(picture, "preprocess", _upload)  # noqa: B010 - the bytes as they are, and their name
                # Not gr.Examples, which puts another component into the place of the picture's.
                offered = gr.Dataset(
                    components=[picture], samples=[[path] for path in pictures], label="Examples", type="index",
                    samples_per_page=24, elem_id="examples", visible=bool(pictures),
                )  # fmt: skip
                count = control(gr.Radio, "count", list(range(1, MOST_RESULTS + 1)), elem_id="count")
                names = [(os.path.basename(os.path.normpath(path)) if os.path.exists(path) else path, path)
                         for path in studio.models]  # fmt: skip
                model = control(gr.Dropdown, "model", names, value=first.path, visible=len(names) > 1)
            with gr.Column(min_width=300):
                with gr.Row(elem_id="buttons"):
                    go = gr.Button("Translate", variant="primary", min_width=100, elem_id="translate")
                    stop = gr.Button("Stop", min_width=100, elem_id="stop")
                status = gr.Textbox(
                    "Press Translate to begin.", show_label=False, container=False, interactive=False, max_lines=6,
                    elem_id="status",
                )  # fmt: skip
                preview = gr.Image(label="Result", format="jpeg", interactive=False, buttons=[], elem_id="preview")
                compare, download = [], []
                with gr.Row(elem_id="results"):
                    for _ in range(MOST_RESULTS):
                        with gr.Column(min_width=140):
                            slider = gr.ImageSlider(
                                format="png", type="filepath", image_mode=None, interactive=False, visible=False,
                                elem_classes="compare",
                            )  # fmt: skip
                            compare.append(slider)
                            download.append(gr.DownloadButton(visible=False, size="sm", elem_classes="download"))
        with gr.Row():
            with gr.Column(min_width=240):
                area = control(gr.Dropdown, "area", first.areas)
            with gr.Column(min_width=240):
                range_t = control(gr.Slider, "range_t", 0, 0.95, step=0.05)
            with gr.Column(min_width=240):
                steps = control(gr.Slider, "steps", 1, first.most_steps, step=1)
            with gr.Column(min_width=240):
                seed = control(gr.Number, "seed", precision=0, minimum=0)
                another = gr.Button("Random seed", size="sm", elem_id="random_seed")
        class_index = control(gr.Textbox, "class_index", **{"value": settings.class_index or "", **_classes(first)})
        with gr.Accordion("More settings", open=False), gr.Row():
            with gr.Column(min_width=300):
                start = control(gr.Slider, "start", 0.05, 1, step=0.05)
                details = control(gr.Slider, "details", 0, 1, step=0.02)
                energy = control(gr.CheckboxGroup, "energy", energies, value=energy_names(settings.energy))
            with gr.Column(min_width=300):
                sampler = control(gr.Dropdown, "sampler", list(SOLVERS))
                variant = control(gr.Dropdown, "variant", list(VARIANTS))
                precision = control(gr.Dropdown, "precision", list(PRECISIONS))
        text = gr.Textbox(
            label="Equivalent command", info="Run it in the project's folder, with your picture in it.",
            interactive=False, visible=False, lines=1, max_lines=12, buttons=["copy"], elem_id="command",
        )  # fmt: skip

        def translate(
            picture: Any, area: int, t0: float, steps: int, seed: int, model: str, late_start: float, energy: list[str],
            variant: str, sampler: str, precision: str, class_index: str, count: int, details: float,
        ) -> Iterator[Sequence[Any]]:  # fmt: skip
            """Translate a picture: (preview, (reference, translation), status, command, pairs of further seeds)."""
            same = gr.skip()
            try:
                wanted = Settings(
                    area=area, range_t=round(t0, 4), steps=steps, seed=seed, count=count, start=round(late_start, 4),
                    details=round(details, 4), energy=",".join(energy) or "none", variant=variant, sampler=sampler,
                    precision=precision, class_index=class_index.strip() or None,
                )  # fmt: skip
                path, name = picture or ("", "")
                shown = command(model, picture, wanted) if picture else same
                for frame in studio.translate(model, path, wanted, name=name):
                    pairs = _pairs(frame, name, wanted.seeds, compare[0].GRADIO_CACHE)
                    yield frame.preview, pairs[0], frame.words, shown, *pairs[1:]
            except Exception as error:
                words = explain(error)
                yield same, same, words, same, *[same] * (MOST_RESULTS - 1)
                raise gr.Error(words, title="Translation failed", duration=12, print_exception=False) from None

        def begin() -> Sequence[Any]:  # the preview takes the place of the latest results
            hidden = [gr.update(visible="hidden")] * 2 * MOST_RESULTS
            return (gr.update(value=None, visible=True), "Waiting for the device …", *hidden)

        def end(written: str | None, *pairs: tuple[str, str] | None) -> Sequence[Any]:
            files = [pair[1] if pair else None for pair in pairs]
            sliders, buttons = [], []
            for file in files:
                of = f" seed {os.path.splitext(file)[0].rpartition('_seed')[2]}" if file and any(files[1:]) else ""
                shown = True if file else "hidden"
                sliders.append(gr.update(visible=shown, label=of.strip().capitalize() or "Before | after"))
                buttons.append(gr.update(visible=shown, value=file, label=f"Download{of}"))
            return (gr.update(visible=not any(files)), gr.update(visible=bool(written)), *sliders, *buttons)

        def hint(uploaded: Upload | None, path: str) -> str:
            if uploaded and os.path.basename(path) == os.path.basename(RECOMMENDED["model_path"]):
                with contextlib.suppress(ImageError, InputError):
                    if looks_like_a_photograph(uploaded.path):
                        return PHOTOGRAPH
            return gr.skip()

        def adapt(path: str, area: int, steps: int) -> Sequence[Any]:
            chosen = studio.models[path]
            return (
                gr.update(choices=chosen.areas, value=chosen.nearest_area(area)),
                gr.update(maximum=chosen.most_steps, value=min(steps, chosen.most_steps)),
                gr.update(**_classes(chosen)),
            )

        private = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        controls = [picture, area, range_t, steps, seed, model, start, energy, variant, sampler, precision, class_index]
        shown, ended = [text, *compare], [preview, text, *compare, *download]
        begun = go.click(begin, None, [preview, status, *compare, *download], **private)
        translation = begun.then(
            translate, [*controls, count, details], [preview, compare[0], status, text, *compare[1:]],
            api_name="translate", show_progress="hidden",
        )  # fmt: skip
        translation.success(end, shown, ended, **private)
        translation.failure(end, shown, ended, **private)
        stopped = stop.click(end, shown, ended, cancels=[translation], **private)
        stopped.then(lambda: "Stopped.", None, [status], **private)
        another.click(lambda: random.randrange(10**6), None, [seed], **private)
        picture.change(hint, [picture, model], [status], **private)
        offered.click(lambda number: pictures[number], [offered], [picture], **private)
        model.change(adapt, [model, area, steps], [area, steps, class_index], **private)
    return page


def serve(page: Any, *, host: str, port: int, examples: str | None = None) -> str:
    """Serve a page, whose only readable folder is `examples`, until it is closed; returns its address."""
    page.queue(max_size=16, default_concurrency_limit=1)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # the visitor's own
    theme = gr.themes.Default(**fonts)  # type: ignore[reportPrivateImportUsage]
    options: dict[str, Any] = {
        "server_name": host,
        "server_port": port,
        "prevent_thread_lock": True,
        "quiet": True,
        "css": STYLE,
        # Help texts dark enough to read.
        "theme": theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"),
        "share": False,  # it would download a program that tunnels
        "max_file_size": "20mb",
        "show_error": True,
        "run_history": False,
        "footer_links": ["api"],
        "enable_monitoring": False,
        "mcp_server": False,
        "ssr_mode": False,
        "allowed_paths": [os.path.abspath(examples)] if examples else [],
    }
    known = inspect.signature(page.launch).parameters  # versions before 6.20 or so have no history of runs
    return page.launch(**{name: value for name, value in options.items() if name in known})[1]


def close(page: Any) -> None:
    """End the server at once; it would wait for open tabs, and report that it did not."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    page.server.force_exit = True
    page.close(verbose=False)


def _classes(model: Model) -> dict[str, Any]:
    return {"visible": model.classes > 0, "placeholder": f"0 to {model.classes - 1}"}


def _upload(payload: Any) -> Upload | None:
    """The file as it was uploaded. Gradio would decode and rename it."""
    if payload is None or not payload.path:
        return None
    name = os.path.basename((payload.orig_name or payload.path).replace("\\", "/"))
    return Upload(payload.path, name or "picture")


def _pairs(frame: Frame, source: str, seeds: range, folder: str) -> list[Any]:
    """(reference, file of a result) for every slider: files of their own folder, named after source and seed."""
    if not frame.results:
        return [gr.skip()] * MOST_RESULTS
    stem = re.sub(r"[^\w.() -]", "_", os.path.splitext(source)[0])[:60]  # names may be longer than files' may be
    folder = tempfile.mkdtemp(dir=folder)
    pairs: list[Any] = [None] * MOST_RESULTS
    for n, (seed, result) in enumerate(zip(seeds, frame.results)):
        path = os.path.join(folder, f"{stem}_seed{seed}.png")
        result.save(path)
        pairs[n] = frame.reference, path
    return pairs
